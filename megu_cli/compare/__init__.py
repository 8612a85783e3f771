"""`megu compare`: one request through many methods and seeds, on the same splits, original, oracle and clock."""

from megu_cli.compare.arena import Arena
from megu_cli.compare.comparison import Comparison
from megu_cli.compare.methods import REFERENCES
from megu_cli.compare.statistics import distances, figures, nearest, paired, summary
from megu_cli.compare.tuning import score

__all__ = ["REFERENCES", "Arena", "Comparison", "distances", "figures", "nearest", "paired", "score", "summary"]

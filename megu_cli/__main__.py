"""``python -m megu_cli`` is ``megu``."""

from megu_cli.entry import script

if __name__ == "__main__":
    script()

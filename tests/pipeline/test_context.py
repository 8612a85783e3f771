"""One run: what opening it does, what its siblings share, and what a stage that has run replaces."""

import torch
from conftest import write_config

from megu_cli.config import changed, load_config
from megu_cli.execution import runtime
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline


def test_only_start_sets_the_state_of_the_process(tmp_path):
    run = RunContext.open(load_config(write_config(tmp_path, model={"precision": "bfloat16"})))
    mode, before = torch.get_deterministic_debug_mode(), runtime._precision
    torch.set_deterministic_debug_mode("default")
    runtime.use_precision("auto")
    try:
        _ = run.inputs.request, run.execution, run.build()
        assert (torch.get_deterministic_debug_mode(), runtime._precision) == (0, "auto")
        run.runtime.start()
        assert (torch.get_deterministic_debug_mode(), runtime._precision) == (1, "bfloat16")
    finally:
        torch.set_deterministic_debug_mode(mode)
        runtime.use_precision(before)


def test_a_stage_starts_the_runtime(tmp_path):
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        Pipeline(RunContext.open(load_config(write_config(tmp_path)))).run(goals=["train"])
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(mode)


def test_a_sibling_shares_what_is_loaded(tmp_path):
    run = RunContext.open(load_config(write_config(tmp_path)))
    other = run.sibling(changed(run.config, {"seed": 5, "out": tmp_path / "other"}))
    assert other.inputs.data is run.inputs.data
    assert other.inputs.request is run.inputs.request
    assert other.inputs.rater is run.inputs.rater
    assert other.directory.file_digests is run.directory.file_digests
    assert other.inputs.original.path == tmp_path / "other" / "original.safetensors"
    other.inputs.free_rater()
    assert other.inputs.rater is run.inputs.rater
    unrated = run.sibling(changed(run.config, {"mllm.backend": "none"}))
    assert unrated.inputs.rater is not run.inputs.rater
    drawn = run.sibling(changed(run.config, {"seed": 5}), request=False)
    assert drawn.inputs.request is not run.inputs.request


def test_the_checkpoint_is_read_again_once_a_stage_has_replaced_it(tmp_path):
    file = write_config(tmp_path)
    run = RunContext.open(load_config(file))
    Pipeline(run).run(goals=["train"])
    first = run.inputs.original.weights
    assert run.inputs.original.weights is first
    Pipeline(run).build(["train"], force=True)
    assert run.inputs.original.weights is not first

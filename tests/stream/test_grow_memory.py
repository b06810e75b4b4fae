"""``--max-memory``: an offline growth stays below it, whatever the size of the tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.config_file import parse_config
from elle_mp.errors import UserError
from elle_mp.models.declarations import declarations
from elle_mp.models.spec import ModelSpec
from elle_mp.ops.random import Bounds
from elle_mp.stream import memory
from elle_mp.stream.run_directory import HEADER
from elle_mp.stream.state import RunState
from tests.distributed_utils import run_distributed
from tests.stream.runs import finish, start

LIMIT = 600
"""MiB."""
RESIDENT = memory.resident_bytes
CHILD = """
import sys
from pathlib import Path
from elle_mp.cli.main import main
from elle_mp.stream import memory

if sys.argv[1] == "unbounded":
    memory.BLOCKS_IN_MEMORY, memory.LARGEST_BLOCK = 1, 1 << 30
try:
    main(sys.argv[2:])
except SystemExit as end:
    assert end.code == 0
lines = Path("/proc/self/status").read_text().splitlines()
print("peak", next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024)
"""


def write_large(run: str) -> int:
    """A run with a checkpoint of 300 MB, nearly all of it in two matrices; its bytes."""
    tree = {
        "model": {"layers": 1, "heads": 8, "head_dim": 64, "mlp": 73728, "seq_len": 16},
        "stream": [{"domain": "a", "data": "none", "steps": 1}],
    }
    config = parse_config(tree)
    spec = ModelSpec.from_config(config, 300)
    tensors = {f"model.{name}": (item.shape(spec.axes), torch.float32) for name, item in declarations(spec).items()}

    def ramp(name: str, bounds: Bounds) -> torch.Tensor:
        return torch.arange(bounds[0][0], bounds[0][1]).float().view(-1, *[1] * (len(bounds) - 1)).expand(
            [high - low for low, high in bounds]
        )  # fmt: skip

    meta = {"state": RunState().to_json(), "model": spec.to_json()}
    CheckpointStore(Path(run, "checkpoints")).save_streamed("a", tensors, ramp, meta, block_bytes=8 << 20)
    saved = config.model_dump(mode="json", by_alias=True)
    Path(run, "config.yaml").write_text(HEADER + yaml.safe_dump(saved, sort_keys=False))
    return sum(path.stat().st_size for path in Path(run, "checkpoints", "a").iterdir())


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_stays_below_what_was_said(tmp_path: Path) -> None:
    """LEMON's channels that hold a mean are made of a whole old matrix, 151 MB: they are made in parts."""
    assert run_distributed(write_large, 1, str(tmp_path / "run"))[0] > 300e6

    def peak(kind: str) -> int:
        sizes = [str(tmp_path / kind), "width=576", "mlp=73728", "growth.width=lemon", "--max-memory", f"{LIMIT}M"]
        ended = finish(start([sys.executable, "-c", CHILD, kind, "grow", str(tmp_path / "run"), *sizes]))
        assert ended.code == 0, ended.err
        return int(ended.out.split()[-1])

    assert peak("bounded") < LIMIT
    assert peak("unbounded") > LIMIT, "the measure sees larger blocks"
    one, other = (StoredTensors(tmp_path / kind / "checkpoints" / "a-grown") for kind in ("bounded", "unbounded"))
    place = ((0, 576), (1000, 1010))
    values = [item.read("model.layers.0.mlp.out_weight", place) for item in (one, other)]
    assert torch.equal(*values) and bool((values[0] == 255.5).any())  # the mean of the rows 0 to 511


def agreed() -> tuple[int, str]:
    """A block size where the second rank is larger than the first, and what is said when it does not fit."""
    memory.resident_bytes = lambda: (200 + 300 * dist.get_rank()) << 20
    try:
        with pytest.raises(UserError) as raised:
            memory.block_bytes(560 << 20)
        return memory.block_bytes(700 << 20), str(raised.value)
    finally:
        memory.resident_bytes = RESIDENT


@pytest.mark.distributed
def test_all_ranks_take_the_same_block() -> None:
    """They share the blocks out among them: the size has to be that of the rank with the least room."""
    room = (700 << 20) - (500 << 20) - memory.RESERVE
    said = "--max-memory: the program itself takes 596 MiB; give 604M or more"
    assert run_distributed(agreed, 2) == [(room // memory.BLOCKS_IN_MEMORY, said)] * 2


def test_sizes_are_read_as_they_are_written() -> None:
    assert [memory.parse_bytes(text) for text in ("4G", "4 GiB", "800M", "1.5gb", "7", "64k")] == [
        4 << 30, 4 << 30, 800 << 20, 3 << 29, 7, 64 << 10
    ]  # fmt: skip
    for text in ("", "G", "-1G", "4 gigabytes", "1e9", "4G5"):
        with pytest.raises(UserError, match="--max-memory"):
            memory.parse_bytes(text)

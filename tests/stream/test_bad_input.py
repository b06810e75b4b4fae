"""What a user can get wrong: exit code 2, one clear line, no traceback, nothing lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.stream.runs import (
    TIMINGS,
    Ended,
    documents,
    lines,
    record,
    reference,
    run,
    succeed,
    without,
    write_jsonl,
    write_stream,
)


@dataclass(frozen=True)
class Mistake:
    """How a good stream is spoilt, with which overrides it is run, and what the line must name."""

    names: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    spoil: Callable[[Path], object] = lambda folder: None


def bad_line(folder: Path) -> None:
    good = [*documents(1)][:20]
    path = write_jsonl(folder / "b.jsonl", good)
    path.write_text(path.read_text() + '{"text": "half\n')


MISTAKES = {
    "empty file": Mistake(("stream.1.data", "b.jsonl", "empty"), spoil=lambda at: (at / "b.jsonl").write_text("")),
    "blank file": Mistake(("b.jsonl", "no document"), spoil=lambda at: (at / "b.jsonl").write_text("\n \n")),
    "not JSON": Mistake(("b.jsonl:21", "not JSON"), spoil=bad_line),
    "no text": Mistake(("a.jsonl:1", '"text"'), spoil=lambda at: (at / "a.jsonl").write_text('{"txt": "a"}\n')),
    "too little text": Mistake(("domain b", "too few"), spoil=lambda at: write_jsonl(at / "b.jsonl", ["a bo", "c"])),
    "missing file": Mistake(("stream.0.data", "no such data"), spoil=lambda at: (at / "a.jsonl").unlink()),
    "memory too small": Mistake(("memory.tokens=30", "31"), ("memory.tokens=30",)),
    "domain twice": Mistake(("stream.1.domain=a", "named twice"), ("stream.1.domain=a",)),
    "unknown family": Mistake(("model.family", "gtp", "'bert', 'gpt' or 'llama'"), ("model.family=gtp",)),
    "typo in a key": Mistake(("optim.lrr", "unknown key", "did you mean 'lr'"), ("optim.lrr=1",)),
    "shrinks": Mistake(("stream.2.grow.layers=2", "3 or more"), ("stream.2.grow.layers=2",)),
    "vocabulary too large": Mistake(("tokenizer.vocab_size=9000", "largest"), ("tokenizer.vocab_size=9000",)),
    "no tokenizer there": Mistake(("tokenizer", "nowhere"), ("tokenizer.path=nowhere",)),
    "ranks": Mistake(("parallel", "tp=2", "torchrun --nproc-per-node"), ("parallel.tp=2",)),
    "batch": Mistake(("batch.micro=3", "2 or 4"), ("batch.micro=3",)),
    "below a file": Mistake(("run.dir", "another folder"), ("run.dir={at}/a.jsonl/run",)),
    "a file": Mistake(("run.dir", "is a file"), ("run.dir={at}/a.jsonl",)),
    "no run": Mistake(("run.dir", "holds no run"), ("run.dir={at}",)),
    "growth": Mistake(("growth.width=replicate", "weighted"), ("growth.width=replicate",)),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ended, set[str], Path]]:
    """Every mistake, made on a stream of its own, two at a time: how it ended, the files before, the folder."""

    def make(item: tuple[str, Mistake]) -> tuple[str, tuple[Ended, set[str], Path]]:
        name, mistake = item
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        config = write_stream(folder)
        mistake.spoil(folder)
        before = {path.name for path in folder.iterdir()}
        return name, (run(config, *(text.format(at=folder) for text in mistake.overrides)), before, folder)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(make, MISTAKES.items()))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, endings: dict[str, tuple[Ended, set[str], Path]]) -> None:
    ended, before, folder = endings[name]
    check_one_line(ended)
    for part in MISTAKES[name].names:
        assert part in ended.err
    left = {path.name for path in folder.iterdir()} - before
    assert left <= {"run"}
    assert not [path for path in folder.rglob("*") if "writing" in path.name]
    if name not in ("not JSON", "blank file", "no text", "too little text", "vocabulary too large"):
        assert left == set(), "wrong before anything starts"


def test_what_is_put_right_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    """Nothing was learned before the mistake was found, so a mended configuration needs no other folder."""
    config = write_stream(tmp_path)
    bad_line(tmp_path)
    check_one_line(run(config, "tokenizer.vocab_size=330"))
    write_jsonl(tmp_path / "b.jsonl", documents(1))
    succeed(config, strike="all:SIGTERM@step=3")
    told = [without(lines(run_dir, "metrics"), TIMINGS)[:3] for run_dir in (tmp_path / "run", reference("gpt"))]
    assert told[0] == told[1]


def test_a_document_longer_than_the_memory_is_a_note(tmp_path: Path) -> None:
    config = write_stream(tmp_path)
    # Several, so that they are not all held out as valid text.
    write_jsonl(tmp_path / "a.jsonl", [f"{number} " + " ".join(documents(0)) for number in range(4)])
    ended = succeed(config, strike="all:SIGTERM@step=1")
    assert "note: domain a: its longest document has" in ended.out
    assert "memory.tokens=700" in ended.out
    assert ended.err == ""


def test_another_configuration_is_named_and_harms_nothing(tmp_path: Path) -> None:
    config = write_stream(tmp_path)
    run_dir = tmp_path / "run"
    succeed(config, strike="all:SIGTERM@step=5")
    before = contents(run_dir)
    for override, named in (
        ("optim.lr=1.0e-2", "optim.lr=0.003, not 0.01"),
        ("stream.1.grow.layers=4", "stream.1.grow.layers=3, not 4"),
        ("batch.micro=2", "batch.micro=4, not 2"),
    ):
        ended = run(config, override)
        check_one_line(ended)
        assert named in ended.err
        assert str(run_dir) in ended.err
        assert contents(run_dir) == before
    # What changes nothing that is learned may change.
    assert (
        "stopped in stage 0 (a, train) after step 6"
        in succeed(config, "checkpoint.keep=1", strike="all:SIGTERM@step=1").out
    )


def test_damage_is_one_line(tmp_path: Path) -> None:
    config = write_stream(tmp_path)
    succeed(config, strike="all:SIGTERM@step=5")
    saved = tmp_path / "run" / "config.yaml"
    good = saved.read_text()
    saved.write_text(f"{good}{{")
    ended = run(config)
    check_one_line(ended)
    assert "config.yaml" in ended.err
    assert saved.read_text() == f"{good}{{"
    saved.write_text(good)
    assert "stopped" in succeed(config, strike="all:SIGTERM@step=1").out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB; gone afterwards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2000k", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(small_disk: Path, tmp_path: Path) -> None:
    """The disk holds the first stage; the grown model's checkpoint no longer fits."""
    run_dir = small_disk / "run"
    config = write_stream(tmp_path, run={"dir": str(run_dir)}, log={"every": 1, "tensorboard": True})
    ended = run(config)
    check_one_line(ended)
    assert "No space left" in ended.err
    assert "Exception" not in ended.out
    assert (run_dir / "checkpoints" / "latest").read_text().strip() in {
        path.name for path in (run_dir / "checkpoints").iterdir()
    }
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    again = succeed(config)
    assert "going on from checkpoint" in again.out
    assert record(run_dir) == record(reference("gpt"))


def test_metrics_that_cannot_be_written_end_all_ranks_in_one_line(small_disk: Path, tmp_path: Path) -> None:
    """Only the first rank writes them; the others hear of it."""
    run_dir = tmp_path / "run"
    config = write_stream(tmp_path)
    succeed(config, strike="all:SIGTERM@step=4")
    kept = (run_dir / "metrics.jsonl").read_bytes()
    for path in ("metrics.jsonl", "evals.jsonl"):
        (small_disk / path).write_bytes((run_dir / path).read_bytes())
        (run_dir / path).unlink()
        (run_dir / path).symlink_to(small_disk / path)
    (small_disk / "filler").write_bytes(b"x" * (2000 * 1024 - 2 * 4096))
    ended = run(config, "parallel.tp=2", "log.every=1", ranks=2)
    assert ended.code != 0
    spoken = [line for line in ended.err.splitlines() if line.startswith("elle-mp: error: ")]
    assert spoken == ended.err.splitlines()[:1]
    assert "No space left" in spoken[0]
    assert (run_dir / "metrics.jsonl").read_bytes().startswith(kept)


def test_a_read_only_disk_is_one_line(small_disk: Path, tmp_path: Path) -> None:
    run_dir = small_disk / "run"
    config = write_stream(tmp_path, run={"dir": str(run_dir)})
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    succeed(config, strike="all:SIGTERM@step=4")
    before = contents(run_dir)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for override in (f"run.dir={run_dir}", f"run.dir={small_disk / 'other'}"):
        ended = run(config, override)
        check_one_line(ended)
        assert "run.dir" in ended.err
        assert "ead-only" in ended.err
        assert contents(run_dir) == before
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert "stopped in stage 0 (a, train) after step 6" in succeed(config, strike="all:SIGTERM@step=2").out


def check_one_line(ended: Ended) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("elle-mp: error: ")
    assert ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

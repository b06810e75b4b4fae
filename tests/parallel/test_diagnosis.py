"""Which rank is named when nothing goes on, from what the ranks tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from elle_mp.errors import UserError
from elle_mp.parallel.diagnosis import absent_line, hang_line
from elle_mp.parallel.flight_recorder import Collective
from elle_mp.parallel.peer_errors import comes_from_a_peer
from elle_mp.parallel.rank_report import Process, Report, report
from elle_mp.parallel.watch import incident_of

FAR = Process("another", "space", 7, "0")


def collective(group: str, ranks: tuple[int, ...], number: int, operation: str = "all_reduce") -> Collective:
    """One that waits."""
    return Collective(0, operation, f"mesh_{group}", f"{group}{ranks}", ranks, number, False, "[4]", 9.0, 60.0, True)


def told(rank: int, place: str, *waiting: Collective, in_torch: bool = True, **entered: int) -> Report:
    """What a rank says; ``entered`` by axis: the number of its last collective there, with all of four ranks."""
    numbers = {f"{axis}(0, 1, 2, 3)": number for axis, number in entered.items()}
    return Report(
        rank, FAR, place, in_torch, waiting, (), numbers | {item.name: item.number for item in waiting}, "its stack"
    )


def test_who_never_entered_is_named_before_who_waits_for_it() -> None:
    """Ranks 0 and 1 wait for 2 in one group, 3 for 0 in another: only rank 2 is free."""
    everyone = (0, 1, 2, 3)
    reports = [
        told(0, "trainer.py:1", collective("shard", everyone, 5)),
        told(1, "trainer.py:1", collective("shard", everyone, 5)),
        told(2, "batches.py:77 (batch)", in_torch=False, shard=4),
        told(3, "layers.py:3", collective("tp", (0, 3), 8), shard=4),
    ]
    assert hang_line(reports, {}) == "rank 2 never entered all_reduce #5 of shard; it is in batches.py:77 (batch)"


def test_who_waits_for_a_transfer_is_not_blamed_when_another_is_free() -> None:
    reports = [told(0, "pipeline.py:71"), told(1, "layers.py:9 (forward)", in_torch=False)]
    assert hang_line(reports, {}) == "rank 1 is in no collective; it is in layers.py:9 (forward)"


def test_ranks_that_wait_for_each_other_are_all_told() -> None:
    reports = [
        told(0, "a.py:1", collective("tp", (0, 1), 5)),
        told(1, "b.py:2", collective("pp", (0, 1), 7, "broadcast")),
    ]
    assert hang_line(reports, {}) == (
        "rank 0 waits in all_reduce #5 of tp (a.py:1), rank 1 waits in broadcast #7 of pp (b.py:2)"
    )


def test_a_save_in_the_background_is_no_excuse_and_no_reason() -> None:
    aside = Collective(0, "all_gather", "checkpoint", "aside", (0, 1), 3, False, "[1]", 9.0, 3600.0, True)
    reports = [
        told(0, "trainer.py:75", aside, collective("tp", (0, 1), 5)),
        told(1, "batches.py:77 (batch)", aside, in_torch=False),
    ]
    assert hang_line(reports, {}) == "rank 1 never entered all_reduce #5 of tp; it is in batches.py:77 (batch)"
    assert hang_line(reports[:1], {1: FAR}).endswith("rank 0 waits in all_reduce #5 of tp")


def test_who_does_not_answer_comes_first() -> None:
    reports = [told(0, "a.py:1", collective("tp", (0, 1), 5))]
    assert hang_line(reports, {1: FAR}) == (
        "rank 1 does not answer (process 7 on another); rank 0 waits in all_reduce #5 of tp"
    )
    assert absent_line(dict.fromkeys(range(9), FAR)).endswith(
        "rank 3 does not answer (process 7 on another), and 5 ranks more"
    )


def test_a_process_is_seen_to_stop_and_to_go() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        process = Process(os.uname().nodename, os.readlink("/proc/self/ns/pid"), child.pid, fields[19])
        assert process.state == "running"
        os.kill(child.pid, 19)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert process.state == "stopped"
        child.kill()
        child.wait()
        assert process.state == "gone"
    assert Process.mine().state == "running"
    assert FAR.state == "far"


def test_a_report_survives_the_store() -> None:
    mine = report(3, [collective("tp", (0, 3), 2)])
    again = Report.from_json(json.loads(json.dumps(mine.to_json())))
    assert again.text() == mine.text()
    assert again.waiting[0] == mine.waiting[0]
    assert "in test_a_report_survives_the_store" in mine.stacks
    assert "waits in all_reduce #2 of tp (ranks 0, 3; [4])" in mine.text()


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "lost", 1),
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation"), "hang", 1),
        (dist.DistBackendError("NCCL error in: x"), "lost", 1),
        (UserError("cannot write checkpoint x: RuntimeError: Connection closed by peer"), "lost", 1),
        (UserError("optim.lr is wrong"), "failed", 2),
        (RuntimeError("shapes do not fit"), "failed", 1),
        (KeyError("Connection closed by peer"), "failed", 1),
        (KeyboardInterrupt(), "left", 130),
        (SystemExit(143), "left", 143),
    ],
)
def test_what_an_error_means_to_the_job(error: BaseException, kind: str, code: int) -> None:
    incident = incident_of(error, 2)
    assert (incident.kind, incident.rank, incident.code) == (kind, 2, code)
    assert comes_from_a_peer(error) == (kind in ("lost", "hang"))

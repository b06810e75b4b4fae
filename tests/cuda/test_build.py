"""When the CUDA library is built, for what, and what doctor reads from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from elle_mp.ops import cuda_build


def test_a_wish_is_stronger_than_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, expected in (("1", True), ("0", False), ("", Path("/dev/nvidiactl").exists())):
        monkeypatch.setenv("ELLE_MP_BUILD_CUDA", asked)
        assert cuda_build.wanted() is expected


def test_targets_are_those_that_the_compiler_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'sm_80\\nsm_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("ELLE_MP_CUDA_TARGETS", raising=False)
    assert cuda_build.targets(str(nvcc)) == ["sm_80", "sm_90a"]
    monkeypatch.setenv("ELLE_MP_CUDA_TARGETS", "sm_90a sm_120")
    assert cuda_build.targets(str(nvcc)) == ["sm_90a"]


def test_a_library_tells_its_targets(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"\x7fELF\x00" + f"{cuda_build.MARK} sm_80 sm_90a.".encode() + b"\x00rest.")
    assert cuda_build.built_targets(library) == ["sm_80", "sm_90a"]
    library.write_bytes(b"\x7fELF")
    assert cuda_build.built_targets(library) == []

"""Memory that a container allows, and a process that really runs out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch

from t2.adapters.engine.memory import cgroup_bytes, free_bytes
from tests.environments import REPOSITORY

MB = 2**20
NO_LIMIT = 9223372036854771712


def group(root: Path, path: str, **files: str | int) -> None:
    folder = root / "sys/fs/cgroup" / path.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def own(root: Path, text: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)
    return root


def v2(limit: str | int, used: int, cache: int = 0) -> dict[str, str | int]:
    return {
        "memory__max": limit,
        "memory__current": used * MB,
        "memory__stat": f"anon 5\ninactive_file {cache * MB}\nactive_file 7",
    }


def v1(limit: int, used: int, cache: int = 0) -> dict[str, str | int]:
    return {
        "memory__limit_in_bytes": limit,
        "memory__usage_in_bytes": used * MB,
        "memory__stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {cache * MB}",
    }


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    own(tmp_path, "0::/\n")
    group(tmp_path, "/", **v2(512 * MB, 200, 50))
    assert cgroup_bytes(tmp_path) == 362 * MB
    group(tmp_path, "/", **v2("max", 200))
    assert cgroup_bytes(tmp_path) is None
    group(tmp_path, "/", **v2(100 * MB, 101))
    assert cgroup_bytes(tmp_path) == 0


def test_the_least_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    own(tmp_path, "0::/user.slice/job: 1.scope\n")
    group(tmp_path, "/user.slice", **v2(900 * MB, 500))
    group(tmp_path, "/user.slice/job: 1.scope", **v2(600 * MB, 100))
    assert cgroup_bytes(tmp_path) == 400 * MB
    group(tmp_path, "/user.slice", **v2("max", 500))
    assert cgroup_bytes(tmp_path) == 500 * MB


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    # Seen from inside, a container's group is the mount, whatever it is called outside.
    own(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n1:cpuset:/\n0::/\n")
    group(tmp_path, "/memory", **v1(300 * MB, 100, 20))
    assert cgroup_bytes(tmp_path) == 220 * MB
    group(tmp_path, "/memory/docker/abc", **v1(150 * MB, 100))
    assert cgroup_bytes(tmp_path) == 50 * MB
    group(tmp_path, "/memory/docker/abc", **v1(NO_LIMIT, 100))
    assert cgroup_bytes(tmp_path) == 220 * MB


@pytest.mark.parametrize("text", [None, "0::/\n", "4:memory:/\n0::/\n"])
def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        own(tmp_path, text)
    assert cgroup_bytes(tmp_path) is None


def test_what_is_free_is_no_more_than_the_machine_and_the_groups_have(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 0 < free_bytes(cpu) <= psutil.virtual_memory().total
    monkeypatch.setattr("t2.adapters.engine.memory.cgroup_bytes", lambda: 123)
    assert free_bytes(cpu) == 123
    monkeypatch.setattr("t2.adapters.engine.memory.cgroup_bytes", lambda: 2**60)
    assert free_bytes(cpu) < 2**60


def test_a_process_that_runs_out_of_memory_halves_its_batch_and_goes_on() -> None:
    script = """
        import resource, warnings
        import psutil, torch, transformers
        from t2.adapters.engine.base import GenerateRequest
        from t2.adapters.engine.transformers import TransformersEngine
        from tests.adapters.conftest import make_tokenizer
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=104, hidden_size=16, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
        model = transformers.LlamaForCausalLM(config)
        asked = [GenerateRequest(tuple(5 + (i + k) % 90 for k in range(120)), 4) for i in range(32)]
        expected = TransformersEngine(model, make_tokenizer(), "tiny", batch_size=2).generate(asked)
        engine = TransformersEngine(model, make_tokenizer(), "tiny", batch_size=32)
        # One layer's activations of all rows are 120 MB a tensor.
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = engine.generate(asked)
        print(*[str(warning.message).split(": ")[-1] for warning in told], sep="\\n")
        print(found == expected, engine.batch_size)
    """
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *told, last = done.stdout.splitlines()
    assert told[0] == "out of memory with 32 rows, going on with 16"
    same, rows = last.split()
    assert same == "True"
    assert int(rows) == 32 // 2 ** len(told) >= 1

"""The default number of threads: the CPUs of the affinity mask, the quota of the control group, the environment's
word.
"""

import os

import pytest

from mlx_fused_adam import _threads
from support.processes import output_of_python

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_is_respected(monkeypatch):
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); import mlx_fused_adam as f; print(f.num_threads())"
    monkeypatch.delenv("MLX_FUSED_ADAM_NUM_THREADS", raising=False)
    assert output_of_python("-c", code) == "1\n"


# The files of a control group, and how many CPUs of 64 they leave.
GROUPS = {
    "version 2": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 3),
    "its parent's": ({
        "proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
    }, 2),
    "in a container": ({"proc/self/cgroup": "0::/docker/x\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "version 1": ({
        "proc/self/cgroup": "9:memory:/\n4:cpu,cpuacct:/a\n",
        "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000\n",
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
    }, 4),
    "version 1 without a limit": ({
        "proc/self/cgroup": "4:cpu,cpuacct:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }, 64),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
    "a period of 0": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 64),
    "half a line": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000\n"}, 64),
    "no control groups": ({}, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_the_quota_of_a_control_group_is_respected(name, tmp_path, monkeypatch):
    files, expected = GROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert _threads.available_cpus(tmp_path) == expected


def test_the_environment_has_the_last_word():
    assert _threads.default_num_threads({"MLX_FUSED_ADAM_NUM_THREADS": "7"}) == 7
    assert 1 <= _threads.default_num_threads({"MLX_FUSED_ADAM_NUM_THREADS": ""}) <= CPUS
    assert _threads.default_num_threads({"OMP_NUM_THREADS": "5,2"}) == 5
    assert _threads.default_num_threads({"OMP_NUM_THREADS": "1000"}) == _threads.MOST_THREADS
    assert _threads.default_num_threads({"OMP_NUM_THREADS": "5", "MLX_FUSED_ADAM_NUM_THREADS": "7"}) == 7
    for other in ("", "0", "many"):
        assert _threads.default_num_threads({"OMP_NUM_THREADS": other}) == _threads.default_num_threads({})
    for wrong in ("0", "257", "-1", "2x", "١"):
        with pytest.raises(ValueError, match="must be from 1 to 256 but got"):
            _threads.default_num_threads({"MLX_FUSED_ADAM_NUM_THREADS": wrong})

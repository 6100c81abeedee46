"""The CI files: a hosted Mac's GPU, which is virtual, may fail or hang without failing a job; nothing else may."""

import re
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / ".github" / "workflows"


def steps(file: str, job: str) -> list[str]:
    """The texts of a job's steps."""
    text = (WORKFLOWS / file).read_text()
    body = re.split(r"^  (?=[\w-]+:$)", text, flags=re.M)
    (found,) = [part for part in body if part.startswith(f"{job}:\n")]
    return re.split(r"^      - ", found.split("    steps:\n")[1], flags=re.M)[1:]


def test_steps_that_use_the_gpu_have_limits_and_may_fail():
    on_gpu = [step for step in steps("ci.yml", "macos") if re.search(r"gpu|GPU", step)]
    assert len(on_gpu) == 3
    for step in on_gpu:
        assert "continue-on-error: true\n" in step and re.search(r"timeout-minutes: \d+\n", step), step


def test_steps_without_it_may_not_fail():
    others = [step for step in steps("ci.yml", "macos") if not re.search(r"gpu|GPU", step)]
    assert len(others) >= 5 and not any("continue-on-error" in step for step in others)
    assert any("DEVICE=cpu pytest" in step for step in others)
    assert any("--device cpu" in step for step in others)
    assert any("compile_shaders.py" in step for step in others)


@pytest.mark.parametrize("file", [path.name for path in WORKFLOWS.glob("*.yml")])
def test_every_job_has_a_time_limit(file):
    jobs = re.findall(r"^  [\w-]+:\n    (?:.*\n)*?    steps:", (WORKFLOWS / file).read_text(), re.M)
    assert jobs
    for job in jobs:
        assert "timeout-minutes:" in job, job

"""README stays short; environment variables, messages and versions in the documents are those of the code."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "build_tools"))
from mlx_releases import NANOBIND  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
SOURCE_FOLDERS = ("bench", "build_tools", "csrc", "examples", "metal", "python", "tests")


def sources(*folders: str) -> dict[Path, str]:
    kinds = {".py", ".cpp", ".h", ".metal"}
    files = [x for f in folders for x in sorted((ROOT / f).rglob("*")) if x.suffix in kinds]
    return {x.relative_to(ROOT): x.read_text(encoding="utf-8") for x in files}


def without_code_and_tables(text: str) -> str:
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.M)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"^ *\|.*$", "", text, flags=re.M)


def test_readme_is_a_landing_page() -> None:
    prose = re.sub(r"\]\([^)]*\)", "]", without_code_and_tables(README))
    assert len(prose.split()) <= 900
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_are_short(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"<!-- bench:[a-z0-9-]+ -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    lines = [x for x in text.splitlines() if not x.lstrip().startswith("|")]
    assert [x for x in lines if len(x) > 120] == []


def test_readme_sets_up_in_one_line_and_names_the_mlx_that_it_installs() -> None:
    lines = README.splitlines()
    assert "pip install '.[cpu]' && python examples/train.py" in lines
    assert "pip install '.[test]' && pytest" in lines
    newest, *_, oldest = NANOBIND
    assert f"with mlx {newest}" in README and f"mlx {oldest} to {newest}" in README
    assert "MLX_FUSED_ADAM_FOR_MLX=0.32.2" in README and "0.32.2" in NANOBIND


def variables(table: str) -> set[str]:
    return set(re.findall(r"`((?:MLX_)?FUSED_ADAM_[A-Z_]+|DEVICE)`", table))


def test_environment_variables_are_in_one_table() -> None:
    """Each that code reads is there, and code reads each that is there; no other page has such a table."""
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    quoted = r"[\"']((?:MLX_)?FUSED_ADAM_[A-Z_]+|DEVICE)[\"']"
    read = {
        name
        for path, text in sources(*SOURCE_FOLDERS).items()
        if path.name != Path(__file__).name
        for name in re.findall(quoted, text)
    }
    assert {"MLX_FUSED_ADAM_FOR_MLX", "MLX_FUSED_ADAM_ISA", "FUSED_ADAM_KILLS"} <= read
    # Not of the environment: an option of CMake, and a macro.
    assert variables(page) == read - {"FUSED_ADAM_GPU", "FUSED_ADAM_X"}
    for document in DOCUMENTS:
        rows = re.findall(r"^\| `(?:MLX_)?FUSED_ADAM_[A-Z_]+` \|", (ROOT / document).read_text(), re.M)
        assert not rows or document == "docs/environment.md", document


def quoted_messages() -> list[str]:
    """The code in the first columns of docs/troubleshooting.md."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| ", page, re.M)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row)]


def constant_parts(message: str) -> list[str]:
    """Without what differs: "…", and the operation's name in square brackets."""
    parts = re.split(r"…|\[[\w …]+\]", message)
    return [part.strip() for part in parts if len(part.strip()) >= 8]


def literals(text: str) -> list[str]:
    """Python's strings, without docstrings."""
    tree = ast.parse(text)
    docs = {id(x.value) for x in ast.walk(tree) if isinstance(x, ast.Expr)}
    strings = [x for x in ast.walk(tree) if isinstance(x, ast.Constant) and id(x) not in docs]
    return [x.value for x in strings if isinstance(x.value, str)]


def cpp_literals(text: str) -> list[str]:
    text = re.sub(r"//.*", "", text)
    return re.findall(r"\"((?:[^\"\\\n]|\\.)*)\"", re.sub(r"(?<!\\)\"\s*\"", "", text))


def is_made_of(text: str, code: str, shortest: int = 6) -> bool:
    """Whether the text is a sequence of pieces of the code, as a message is that code composes."""
    ends = {0}
    for begin in range(len(text)):
        if begin in ends:
            if len(text) - begin <= 2:
                return True
            end = begin + shortest
            while end <= len(text) and text[begin:end] in code:
                ends.add(end)
                end += 1
    return len(text) in ends


def test_each_message_in_troubleshooting_is_one_of_the_code() -> None:
    code = "\n".join(
        literal
        for path, text in sources("python", "csrc", "build_tools").items()
        for literal in (literals(text) if path.suffix == ".py" else cpp_literals(text))
    )
    code += "\nMLX_FUSED_ADAM_FOR_MLX must be one of \n[MLX_FUSED_ADAM_BACKEND] "
    found = quoted_messages()
    assert len(found) >= 35
    for message in found:
        for part in constant_parts(message):
            assert is_made_of(part, code), f"no code says {part!r}"


def raised(text: str, kinds: set[str]) -> list[list[str]]:
    """The constant parts of each message."""
    found = []
    for node in ast.walk(ast.parse(text)):
        call = getattr(node, "exc", None) or (isinstance(node, ast.Expr) and node.value)
        if not isinstance(call, ast.Call):
            continue
        if getattr(call.func, "id", getattr(call.func, "attr", "")) in kinds:
            values = [x.value for x in ast.walk(call) if isinstance(x, ast.Constant)]
            found.append([x.strip() for x in values if isinstance(x, str) and len(x.strip()) >= 8])
    return found


def test_troubleshooting_has_each_error_that_needs_more_than_its_message() -> None:
    """Not those of a bad argument, which say what must be what."""
    texts = sources("python/mlx_fused_adam")
    texts |= {Path(name): (ROOT / name).read_text() for name in ("build_tools/build_backend.py",)}
    kinds = {"ImportError", "RuntimeError", "SystemExit", "_reject", "_warn"}
    told = [parts for text in texts.values() for parts in raised(text, kinds)]
    known = " ".join(quoted_messages())
    assert len(told) >= 15
    for parts in filter(None, told):
        words = [" ".join(part.split()[:3]) for part in parts]
        assert any(word in known for word in words), parts

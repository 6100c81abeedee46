"""The documents: Sphinx builds docs/ without a warning, Python snippets run, shell snippets and links name what is
there.
"""

import importlib.util
import itertools
import json
import re
import shlex
import textwrap
from html.parser import HTMLParser
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

import mlx_fused_adam
from support import tools
from support.processes import run_python

ROOT = Path(__file__).parents[2]
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/emulator/README.md", *PAGES]
needs_sphinx = tools.needs("furo", "myst_parser", "sphinx")
FOREIGN_MODULES = {"mlx_lm"}  # that documents run, and tests do not install


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def snippets(document: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text_of(document), re.DOTALL | re.M)
    return [textwrap.dedent(code) for _, code in found]


WITH_PYTHON = [document for document in DOCUMENTS if snippets(document, "python")]


def commands(document: str) -> list[list[str]]:
    """The words of each command of the shell snippets, without the variables set before it."""
    found = []
    for code in snippets(document, "sh"):
        unfinished = ""
        for line in code.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(unfinished + line, comments=True)
            except ValueError:  # a quoted text goes on in the next line
                unfinished += f"{line}\n"
                continue
            unfinished = ""
            for is_separator, part in itertools.groupby(words, key="&&".__eq__):
                if not is_separator:
                    found.append(list(itertools.dropwhile(is_assignment, part)))
    return [words for words in found if words]


def is_assignment(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built documentation; any warning is an error."""
    out = tmp_path_factory.mktemp("site")
    build = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", out / "doctrees"]
    done = run_python(*build, ROOT / "docs", out / "html")
    assert done.returncode == 0, done.stderr
    return out / "html"


class Text(HTMLParser):
    """All that a page shows, white space as single blanks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self._parts: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self._parts.append(data)

    def __str__(self) -> str:
        return " ".join("".join(self._parts).split())


@needs_sphinx
def test_the_documentation_builds_without_a_warning(site: Path) -> None:
    for page in PAGES:
        html = (site / Path(page).with_suffix(".html").name).read_text(encoding="utf-8")
        title = text_of(page).partition("\n")[0].removeprefix("# ").replace("`", "")
        assert f"<title>{title}" in html, page


@needs_sphinx
@pytest.mark.parametrize("name", mlx_fused_adam.__all__)
def test_every_public_name_is_in_the_api_page_with_its_docstring(site: Path, name: str) -> None:
    html = (site / "api.html").read_text(encoding="utf-8")
    _, is_there, entry = html.partition(f'id="mlx_fused_adam.{name}"')
    assert is_there, f"{name} is missing in docs/api.md"
    docstring = getattr(mlx_fused_adam, name).__doc__
    # Compiled functions begin with their signature.
    first = re.sub(rf"^{name}\(.*\n+", "", docstring.strip()).partition("\n")[0]
    words = re.sub(r":\w+:`([^`]*)`|`", r"\1", first).split()
    assert len(words) >= 4, f"{name} has no docstring worth the name: {docstring!r}"
    shown = str(Text(entry.partition("<dt class")[0]))
    assert " ".join(words) in shown, f"{name}: {shown}"


@needs_sphinx
def test_links_out_of_docs_hand_out_the_file(site: Path) -> None:
    for page, target in (
        ("state-codes", "csrc/math/encodings.h"),
        ("options", "bench/results/precision.md"),
        ("benchmarks", "bench/results/cpu.md"),
        ("index", "CHANGELOG.md"),  # README's link
    ):
        html = (site / f"{page}.html").read_text(encoding="utf-8")
        (found,) = re.findall(rf'href="(_downloads/[^"]*/{Path(target).name})"', html)
        assert (site / found).read_bytes() == (ROOT / target).read_bytes()


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_snippets_can_be_pasted_in_order(document: str, tmp_path: Path) -> None:
    code = "\n".join(snippets(document, "python"))
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_documents_that_should_have_snippets_do() -> None:
    assert {"README.md", "docs/start.md", "docs/options.md"} <= set(WITH_PYTHON)


def anchors(document: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", text_of(document), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text_of(document)):
        path = (ROOT / document).parent.joinpath(target) if target else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(str(path)), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_are_there(document: str) -> None:
    folders = "csrc|bench|tests|examples|metal|docs|build_tools|python/mlx_fused_adam"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]*\w(?![\w*])", text_of(document)):
        assert (ROOT / path).exists(), f"{document}: {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_shell_snippets_name_what_is_there(document: str) -> None:
    """Scripts with their options, modules, tests and extras."""
    extras = set(metadata("mlx-fused-adam").get_all("Provides-Extra"))
    for words in commands(document):
        command = shlex.join(words)
        if words[0] == "python" and words[1].endswith(".py"):
            script = ROOT / words[1]
            assert script.is_file(), command
            source = script.read_text(encoding="utf-8")
            for option in words[2:]:
                assert not option.startswith("--") or f'"{option}"' in source, command
        if words[0] == "python":
            for _, module in filter(lambda pair: pair[0] == "-m", itertools.pairwise(words)):
                assert module in FOREIGN_MODULES or importlib.util.find_spec(module), command
        if words[:3] == ["python", "-m", "mlx_fused_adam"]:
            ours = itertools.takewhile(lambda word: word != "-m", words[3:])
            tools = ("__main__", "_tools/run", "_tools/plan")
            source = "".join(text_of(f"python/mlx_fused_adam/{tool}.py") for tool in tools)
            for word in ours:
                assert not word.startswith("--") or f'"{word}"' in source, command
        if words[0] == "pytest":
            paths = [word for word in words[1:] if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths), command
        if words[:2] == ["pip", "install"]:
            for names in re.findall(r"(?:\.|mlx-fused-adam)\[([\w,-]+)\]", command):
                assert set(names.split(",")) <= extras, command


def test_the_options_that_commands_and_yaml_give_are_taken() -> None:
    page = "docs/mlx-lm.md"
    given = [json.loads(x) for x in re.findall(r"'(\{.*?\})'", text_of(page) + text_of("README.md"))]
    given += [yaml.safe_load(x)["optimizer_config"]["adamw"] for x in snippets(page, "yaml")]
    assert len(given) >= 6
    for options in given:
        mlx_fused_adam.AdamW(1e-5, **options)


def test_the_issue_form_asks_for_the_report_but_can_do_without() -> None:
    """Where the package cannot be imported, there is no report, and no code that shows more."""
    form = yaml.safe_load(text_of(".github/ISSUE_TEMPLATE/bug.yml"))
    fields = {field["id"]: field for field in form["body"]}
    description = fields["report"]["attributes"]["description"]
    assert "`python -m mlx_fused_adam --json`" in description and "imported" in description
    required = {name for name, x in fields.items() if x.get("validations", {}).get("required")}
    assert required == {"what", "stock"}


def test_ci_runs_the_tests_as_documented() -> None:
    first, second = re.findall(r"^\((.*)\)$", text_of(".ci/run"), re.MULTILINE)
    assert f"`{first}`" in text_of("README.md") or f"{first}\n" in text_of("README.md")
    assert f"| `{second}` |" in text_of("CONTRIBUTING.md")


def test_ci_builds_the_documentation_as_documented() -> None:
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    steps = [step.get("run") for step in jobs["docs"]["steps"]]
    for command in (
        "pip install '.[cpu,docs]'",
        "sphinx-build -W --keep-going -b html docs build/docs",
    ):
        assert command in steps
        assert command in text_of("CONTRIBUTING.md")

"""Reads the Metal Shading Language as far as the emulator must: tokens, functions, kernels and what their parameters
are.

The rest of a shader is C++, which translate.py leaves to a C++ compiler.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""(?P<space>\s+|^[ \t]*\#[^\n]*)|(?P<name>[A-Za-z_]\w*)|(?P<number>\.?\d(?:[\w.]|[eEpP][+-])*)
      |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?P<mark>\[\[|\]\]|::|->|.)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)

BUILTINS = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_simdgroup",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
}


class MslError(RuntimeError):
    """The shader cannot be translated or compiled; the message is the tool's own."""


@dataclass
class Kernel:
    """One entry point: its host name, the C++ expression that names it, and what each parameter is."""

    host_name: str
    expression: str
    namespaces: tuple[str, ...]
    roles: list[tuple[str, str]]  # ("buffer" | "threadgroup" | "builtin", index or name)


@dataclass
class Shader:
    """A flattened shader as tokens (with the space before each, so that the text can be given back)."""

    tokens: list[str]
    spaces: list[str]
    tail: str
    namespaces: list[tuple[str, ...]] = field(default_factory=list)

    def text(self, first: int, last: int) -> str:
        parts = [self.spaces[i] + self.tokens[i] for i in range(first, last)]
        return "".join(parts).strip()

    def whole(self) -> str:
        return "".join(s + t for s, t in zip(self.spaces, self.tokens, strict=True)) + self.tail

    def matching(self, opening: int) -> int:
        """Index of the bracket that closes the one at `opening`."""
        opens, closes = next(pair for pair in ("()", "[]", "{}", "<>") if self.tokens[opening][0] == pair[0])
        depth = shield = 0
        for i in range(opening, len(self.tokens)):
            token = self.tokens[i]
            if opens != "<":
                depth += token.count(opens) - token.count(closes)
            else:
                # Parentheses shield comparisons inside them; nor does `<` open a list unless it follows a name.
                shield += (token == "(") - (token == ")")
                is_list = not shield and (token == ">" or re.match(r"\w", self.tokens[i - 1]))
                depth += ((token == "<") - (token == ">")) if is_list else 0
            if depth <= 0:
                return i
        raise MslError(f"unbalanced {opens!r} after {self.text(max(0, opening - 8), opening)}")

    def remove(self, first: int, last: int) -> None:
        """Takes tokens out; the space between stays, as it may hold line markers."""
        kept = "".join(self.spaces[first:last])
        for tokens in (self.tokens, self.spaces, self.namespaces):
            del tokens[first:last]
        if first < len(self.spaces):
            self.spaces[first] = kept + self.spaces[first]
        else:
            self.tail = kept + self.tail


@dataclass
class Function:
    """The definition of a function, as token indices."""

    start: int  # of the declaration
    head: int  # behind template <...>
    body: int  # the opening brace
    end: int  # behind the closing one
    scope: int  # numbers the namespace or class around it
    in_class: bool


def tokenize(text: str) -> Shader:
    tokens: list[str] = []
    spaces: list[str] = []
    pending = ""
    for match in TOKEN.finditer(text):
        if match.lastgroup == "space":
            pending += match.group()
        else:
            tokens.append(match.group())
            spaces.append(pending)
            pending = ""
    shader = Shader(tokens, spaces, pending)
    _find_namespaces(shader)
    return shader


def _find_namespaces(shader: Shader) -> None:
    """Notes for every token the namespaces that enclose it."""
    stack: list[str | None] = []
    pending: str | None = None
    for i, token in enumerate(shader.tokens):
        before = shader.tokens[i - 1] if i else ""
        if before == "namespace" and shader.tokens[i - 2 : i - 1] != ["using"]:
            pending = token
        elif token in ("=", ";"):
            pending = None
        elif token == "{":
            stack.append(pending)
            pending = None
        elif token == "}" and stack:
            stack.pop()
        shader.namespaces.append(tuple(name for name in stack if name))


def find_functions(shader: Shader) -> list[Function]:
    """Every function definition, and whatever else declares something with a brace outside of functions."""
    tokens = shader.tokens
    functions: list[Function] = []
    scopes = [(0, False)]
    count = 1
    start = i = 0
    while i < len(tokens):
        if tokens[i] == "(":
            i = shader.matching(i)
        elif tokens[i] == ";":
            start = i + 1
        elif tokens[i] == "}":
            scopes.pop()
            start = i + 1
        elif tokens[i] == "{":
            head = start
            if tokens[start : start + 2] == ["template", "<"]:
                head = shader.matching(start + 1) + 1
            if tokens[head] in ("namespace", "struct", "class", "union", "enum", "extern"):
                scopes.append((count, tokens[head] in ("struct", "class")))
                count += 1
                start = i + 1
            else:
                end = shader.matching(i) + 1
                functions.append(Function(start, head, i, end, *scopes[-1]))
                i, start = end - 1, end
        i += 1
    return functions


def _parameter_roles(shader: Shader, first: int, last: int) -> list[tuple[str, str]]:
    """The kinds of the parameters between two parentheses, from their attributes."""
    roles: list[tuple[str, str]] = []
    attribute: tuple[str, str] | None = None
    is_threadgroup = any_token = False
    depth = 0
    i = first
    while i <= last:
        token = shader.tokens[i]
        if i == last or (token == "," and depth == 0):
            if any_token:
                roles.append(attribute or (("threadgroup" if is_threadgroup else "buffer"), "-1"))
            attribute, is_threadgroup, any_token = None, False, False
        elif token == "[[":
            end = shader.matching(i)
            name = shader.tokens[i + 1]
            if name in ("buffer", "threadgroup"):
                attribute = (name, shader.text(i + 3, shader.matching(i + 2)))
            elif name in BUILTINS:
                attribute = ("builtin", name)
            elif name not in ("maybe_unused",):
                raise MslError(f"the emulator does not know the parameter attribute [[{name}]]")
            i = end
        else:
            any_token = any_token or token != "void"
            is_threadgroup = is_threadgroup or token == "threadgroup"
            depth += token in "([{<"
            depth -= token in ")]}>"
        i += 1
    return roles


def find_kernels(shader: Shader) -> list[Kernel]:
    """Every kernel that a host can name: plain ones, and instantiations with [[host_name]]."""
    tokens = shader.tokens
    definitions: dict[str, list[tuple[str, str]]] = {}
    plain: list[Kernel] = []
    named: list[Kernel] = []
    i = 0
    while i < len(tokens):
        host_name = None
        start = i
        while tokens[i] == "[[" and tokens[i + 1] in ("host_name", "kernel"):
            if tokens[i + 1] == "host_name":
                host_name = tokens[i + 3].strip('"')
            i = shader.matching(i) + 1
        is_kernel = i > start or tokens[i] == "kernel"
        if not is_kernel:
            i += 1
            continue
        i += tokens[i] == "kernel"
        if tokens[i] == "decltype":
            end = shader.matching(i + 1)
            expression = shader.text(i + 2, end)
            named.append(Kernel(host_name or "", expression, shader.namespaces[i], []))
            i = end
            continue
        while tokens[i] == "[[":  # such as [[max_total_threads_per_threadgroup(n)]]
            i = shader.matching(i) + 1
        if tokens[i] != "void":
            raise MslError(f"a kernel must return void: {shader.text(i, i + 6)}")
        name = tokens[i + 1]
        opening = i + 2
        is_instantiation = tokens[opening] == "<"
        if is_instantiation:
            opening = shader.matching(opening) + 1
        closing = shader.matching(opening)
        expression = shader.text(i + 1, opening)
        if is_instantiation:
            named.append(Kernel(host_name or "", expression, shader.namespaces[i], []))
        else:
            definitions[name] = _parameter_roles(shader, opening + 1, closing)
            if tokens[start - 1] != ">":  # a template has only its instantiations
                plain.append(Kernel(host_name or name, name, shader.namespaces[i], definitions[name]))
        i = closing
    for kernel in named:
        base = re.split(r"\s*<", kernel.expression)[0].split("::")[-1].strip()
        if base not in definitions:
            raise MslError(f'[[host_name("{kernel.host_name}")]]: there is no kernel {base}')
        kernel.roles = definitions[base]
    return plain + [k for k in named if k.host_name]

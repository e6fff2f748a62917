"""The one file that .ci/amalgamate.py writes, for small packages."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import amalgamate
import pytest
from single_file.source import Refusal

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / ".ci" / "amalgamate.py"
ENTRY = "pack/main.py"
HEAD = '''\
#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""The program."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    # Early.
    gc.disable()
'''
TAIL = '\n\nif __name__ == "__main__":\n    print(main())\n'
MAIN = "\n\ndef main() -> int:\n    return 7\n"
FUTURE = "from __future__ import annotations\n\n"

# Writes a package and returns the one file: the entry's text after its head, then other modules.
Build = Callable[..., str]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def write_and_build(rest: str = "", /, head: str = HEAD, **modules: str) -> str:
        files = {"__init__": '"""Pack."""\n', "main": head + rest + MAIN + TAIL, **modules}
        for name, text in files.items():
            path = tmp_path / "pack" / f"{name.replace('__in_', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return amalgamate.amalgamation(tmp_path, ENTRY)

    return write_and_build


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, args)], check=False, capture_output=True, text=True
    )


def names(root: Path) -> list[str]:
    modules = amalgamate.included_modules(root, ENTRY)
    return [path.relative_to(root / "pack").as_posix() for path in modules]


def rule(path: str) -> str:
    return f"# --- pack/{path} ".ljust(100, "-") + "\n"


def test_whole_text(build: Build) -> None:
    """Head, the line about the origin, imports, sections and the entry's end."""
    text = build(
        "\nimport sys\n\nfrom pack.low import ONE, Low\n\n# Kept.\nTWO = ONE + 1  # Kept too.\n",
        low=f'"""Low things.\n\n    an example\n"""\n\n{FUTURE}import os\nimport gc\n\n'
        "ONE = 1\n\n\nclass Low:\n    '''Doc.'''\n\n    name = os.name\n",
    )
    shebang, _, rest_of_head = HEAD.partition("\n")
    assert text == (
        f"{shebang}\n"
        "# Generated from pack/ by .ci/amalgamate.py: edit there, `make amalgamate`.\n"
        f"{rest_of_head}\n"
        "import os\nimport sys\n\n"
        + rule("low.py")
        + "# Low things.\n#     an example\n\n"
        + "ONE = 1\n\n\nclass Low:\n    '''Doc.'''\n\n    name = os.name\n\n\n"
        + rule("main.py")
        + "\n# Kept.\nTWO = ONE + 1  # Kept too.\n"
        + MAIN
        + TAIL
    )


def test_without_an_early_block_head_ends_after_future_import(build: Build) -> None:
    """An entry with its last `__main__` block alone has a short head."""
    text = build("\nimport os\n", head='"""The program."""\n\n' + FUTURE.rstrip("\n") + "\n")
    assert text.startswith("# Generated from pack/ by .ci/amalgamate.py: edit there, `make amalg")
    assert f'\n"""The program."""\n\n{FUTURE}import os\n\n{rule("main.py")}' in text


def test_dependencies_come_before_users_and_lower_folders_first(
    build: Build, tmp_path: Path
) -> None:
    """The imports decide, then the order of the folders; modules nobody imports stay out."""
    build(
        "\nfrom pack.zoo import Z\nfrom pack.end.b import B\nfrom pack.wire.codes import CODE\n"
        "from pack.settings import S\n",
        zoo="Z = 1\n",
        end__in_b="from pack.end.a import A\nfrom pack.dial.names import N\n\nB = A, N\n",
        end__in_a="A = 1\n",
        dial__in_names="N = 1\n",
        wire__in_codes="CODE = 1\n",
        settings="from pack.wire.more import MORE\n\nS = MORE\n",
        wire__in_more="MORE = 1\n",
        unused="U = 1\n",
    )
    assert names(tmp_path) == [
        "wire/codes.py",
        "wire/more.py",
        "settings.py",
        "end/a.py",
        "dial/names.py",
        "end/b.py",
        "zoo.py",
        "main.py",
    ]


def test_version_of_top_package(build: Build, tmp_path: Path) -> None:
    """`__version__` becomes a section if somebody imports it."""
    text = build("\nfrom pack import __version__\n", __init__='"""Pack."""\n\n__version__ = "1"\n')
    assert rule("__init__.py") + '# Pack.\n\n__version__ = "1"\n' in text
    assert names(tmp_path) == ["__init__.py", "main.py"]


def test_foreign_imports_are_merged_in_the_style_of_ruff(build: Build, tmp_path: Path) -> None:
    """The whole file passes the formatter and the linter with the project's settings."""
    functions = [f"a_long_name_of_a_function_{number}" for number in range(5)]
    long = ", ".join(functions)
    uses = "".join(f"    {name}()\n" for name in functions)
    text = build(
        "\nimport os.path\nimport select as sel\nimport zlib\n"
        "from typing import NamedTuple, Any\n\nimport websocket\n\n"
        "from pack.low import low\nfrom pack.mid import Mid\n\n"
        "print(os, sel, zlib, NamedTuple, Any, websocket, low, Mid)\n",
        low='"""Low."""\n\nimport os\nfrom collections.abc import Sized, Callable\n'
        "from errno import ENOENT, errorcode\nfrom typing import Any, cast\n"
        f"from os import sep as s\nfrom websocket._app import ({long})\n"
        "from websocket import WebSocket, enableTrace, ABNF\n"
        "\n\ndef low() -> Any:\n    import json\n\n"
        "    print(os, cast, Callable, Sized, ENOENT, errorcode, s, WebSocket, enableTrace, ABNF)\n"
        f"    print(json)\n{uses}",
        mid='"""Mid."""\n\n\nclass Mid:\n    """Mid."""\n',
    )
    block = text[text.index("gc.disable()\n") : text.index("# ---")].partition("\n\n")[2]
    assert block.startswith(
        "import os\nimport os.path\nimport select as sel\nimport zlib\n"
        "from collections.abc import Callable, Sized\nfrom errno import ENOENT, errorcode\n"
        "from os import sep as s\nfrom typing import Any, NamedTuple, cast\n\n"
        "import websocket\nfrom websocket import ABNF, WebSocket, enableTrace\n"
        "from websocket._app import (\n    a_long_name_of_a_function_0,\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    out = tmp_path / "ssh_proxy_command.py"
    out.write_text(text)
    for args in (["format", "--diff"], ["check"]):
        ruff = run("-m", "ruff", *args, "--no-cache", out)
        assert ruff.returncode == 0, ruff.stdout + ruff.stderr


def test_blank_lines_before_a_class(build: Build) -> None:
    """After a header two blank lines go before a class; after imports one goes before a header."""
    low = '"""Low."""\n\nclass Low: ...\n'
    section = f"{rule('low.py')}# Low.\n\n\nclass Low: ...\n\n\n"
    assert f"import os\n\n{section}" in build("\nimport os\n\nfrom pack.low import Low\n", low=low)
    assert f"gc.disable()\n\n\n{section}" in build("\nfrom pack.low import Low\n", low=low)


def test_import_in_a_function_is_resolved(build: Build) -> None:
    """The import of the package goes without a trace, the foreign one stays."""
    text = build(
        "\n\ndef late() -> int:\n    from pack.low import low  # Goes too.\n\n    return low\n"
        "\n\ndef later() -> int:\n    import json  # Stays.\n\n    from pack.low import (\n"
        "        low,\n    )\n\n    return json, low\n"
        "\n\ndef last() -> int:\n    if low:\n        print()\n\n        from pack.low import low\n"
        "    return low\n",
        low="low = 1\n",
    )
    assert "def late() -> int:\n    return low\n\n\n" in text
    assert "def later() -> int:\n    import json  # Stays.\n\n    return json, low\n\n\n" in text
    assert "    if low:\n        print()\n\n    return low\n" in text


def test_type_checking_block_goes_if_empty(build: Build) -> None:
    """Without the block, its own import goes too; the module still becomes a section."""
    text = build(
        "\nfrom typing import TYPE_CHECKING, Any\n\n"
        "if TYPE_CHECKING:\n    from pack.low import Low\n\nITEM: Low | Any = 1\n",
        low="class Low: ...\n",
    )
    assert "TYPE_CHECKING" not in text
    assert "from typing import Any\n" in text
    assert f"class Low: ...\n\n\n{rule('main.py')}\nITEM: Low" in text


def test_type_checking_block_keeps_its_foreign_imports(build: Build) -> None:
    """What remains of the block stands in its module's section."""
    text = build(
        "\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import ssl\n\n"
        "    from pack.low import Low\n\nITEM: Low | ssl.SSLSocket = 1\n",
        low="class Low: ...\n",
    )
    assert "from typing import TYPE_CHECKING\n" in text
    assert "if TYPE_CHECKING:\n    import ssl\n\nITEM: Low" in text


def test_foreign_import_in_a_block_defines_its_name(build: Build) -> None:
    """An import that may fail stays in place; other modules import its name from there."""
    guarded = "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None\n"
    text = build("\nfrom pack.low import fcntl\n", low=guarded)
    assert f"{rule('low.py')}\n{guarded}\n\n" in text


def test_blank_lines_around_a_removed_import_stay_as_the_larger(build: Build) -> None:
    """Between a constant and a function two remain, between constants one."""
    text = build(
        "\nONE = 1\n\nfrom pack.low import low\n\n\ndef one() -> None: ...\n\n\nTWO = 2\n"
        "from pack.low import last\n\nTHREE = 3\n",
        low="low = last = 1\n",
    )
    assert "\nONE = 1\n\n\ndef one() -> None: ...\n\n\nTWO = 2\n\nTHREE = 3\n" in text


def test_shadows_in_functions_are_left_alone(build: Build) -> None:
    """A parameter, a local name and a comprehension may share the name of another module."""
    build(
        "\nfrom pack.low import LOW\n\nALL = [low for low in (1, LOW)]\n\n\n"
        "def one(low: int) -> None:\n    last = low\n    print(last)\n",
        low="LOW = 1\nlow = 1\nlast = 2\n",
    )


def test_generated_file_is_read_by_python_39(build: Build) -> None:
    """The grammar of each module is held to that of the oldest Python."""
    text = build("\nfrom pack.low import low\n", low="low = 1\n")
    ast.parse(text, feature_version=(3, 9))
    with pytest.raises(Refusal, match=r"^pack/low\.py:\d: Python 3\.9 cannot read this: "):
        build("\nfrom pack.low import low\n", low="low = 1\nmatch low:\n    case 1: ...\n")


LOW = "\nfrom pack.low import low\n"
MID = "\nfrom pack.low import low\nfrom pack.mid import mid\n"

# The entry's text after its head, low.py, where the refusal is, and what the refusal says.
REFUSED = {
    "an alias": ("\nfrom pack.low import low as l\n", "low = 1\n", "main.py:15", "own name"),
    "an imported module": ("\nimport pack.low\n", "low = 1\n", "main.py:15", "not the module"),
    "a renamed module": ("\nimport pack.low as l\n", "", "main.py:15", "not the module"),
    "a module as a name": ("\nfrom pack import low\n", "low = 1\n", "main.py:15", "not the module"),
    "a star": ("\nfrom pack.low import *\n", "low = 1\n", "main.py:15", "`import \\*`"),
    "a foreign star": (LOW, "from os import *\n\nlow = 1\n", "low.py:1", "`import \\*`"),
    "a relative import": ("\nfrom .low import low\n", "low = 1\n", "main.py:15", "full name"),
    "a late relative import": (LOW, "def low():\n    from . import x\n", "low.py:2", "full name"),
    "no such module": ("\nfrom pack.none import x\n", "", "main.py:15", "no module pack.none"),
    "no such name": (LOW, "lower = 1\n", "main.py:15", "pack/low.py does not define low"),
    "a re-export": (
        "\nfrom pack.low import sep\n",
        "from os import sep\n",
        "main.py:15",
        "import sep from the module that defines it",
    ),
    "__all__": (LOW, "__all__ = ['low']\nlow = 1\n", "low.py:1", "__all__"),
    "__name__": (LOW, "def low():\n    return __name__\n", "low.py:2", "__name__ means"),
    "__file__": (LOW, "low = __file__\n", "low.py:1", "__file__ means"),
    "__package__": (LOW, "low = __package__\n", "low.py:1", "__package__ means"),
    "__doc__": (LOW, "low = __doc__\n", "low.py:1", "__doc__ means"),
    "globals()": (LOW, "low = globals()\n", "low.py:1", "globals means"),
    "a circle": (LOW, "from pack.main import main\n\nlow = 1\n", "low.py:1", "in a circle: pack.m"),
    "a late circle": (
        LOW,
        "def low():\n    from pack.main import main\n\n    return main\n",
        "low.py:2",
        "in a circle: pack.main, pack.low, pack.main",
    ),
    "an import in a class": (
        "\n\nclass A:\n    if True:\n        from pack.low import low\n        x = 1\n",
        "low = 1\n",
        "main.py:18",
        "class body",
    ),
    "an emptied function": (
        "\n\ndef one():\n    from pack.low import low\n",
        "low = 1\n",
        "main.py:17",
        "would be empty",
    ),
    "an emptied try": (
        "\ntry:\n    from pack.low import low\nexcept ImportError:\n    pass\n",
        "low = 1\n",
        "main.py:16",
        "would be empty",
    ),
    "a typing block with an else": (
        "\nif TYPE_CHECKING:\n    from pack.low import low\nelse:\n    x = 1\n",
        "low = 1\n",
        "main.py:16",
        "would be empty",
    ),
    "two statements in a line": (
        "\nfrom pack.low import low; x = 1\n",
        "low = 1\n",
        "main.py:15",
        "same line",
    ),
    "a body in the line": (
        "\nif True: from pack.low import low\nelse: x = 1\n",
        "low = 1\n",
        "main.py:15",
        "would be empty",
    ),
    "a comment over an import": (
        "\n# About it.\nfrom pack.low import low\n",
        "low = 1\n",
        "main.py:16",
        "the comment above",
    ),
    "a comment over a foreign import": (
        LOW,
        "import os\n# About it.\nimport sys\n\nlow = 1\n",
        "low.py:3",
        "the comment above",
    ),
    "another future": (
        LOW,
        "from __future__ import generator_stop\n\nlow = 1\n",
        "low.py:1",
        "the entry lacks",
    ),
    "a hidden built-in": (LOW, "low = 1\n\n\ndef open(): ...\n", "low.py:4", "Python's own open"),
    "a hidden built-in by import": (
        LOW,
        "from os import open\n\nlow = 1\n",
        "low.py:1",
        "own open",
    ),
    "two foreign meanings": (
        "\nimport time\n\nfrom pack.low import low\n",
        "from time import time\n\nlow = 1\n",
        "main.py:15",
        "time is imported at pack/low.py:1 with another meaning",
    ),
    "a meaning against the head's": (
        LOW,
        "import os as gc\n\nlow = 1\n",
        "main.py:9",
        "gc is impor",
    ),
    "a name against an import": (
        "\nimport time\n\nfrom pack.low import low\n",
        "time = low = 1\n",
        "low.py:1",
        "time is also imported at pack/main.py:15",
    ),
    "a name against the own import": (
        LOW,
        "import os\n\nlow = 1\nos = 2\n",
        "low.py:4",
        "os is also imported at pack/low.py:1",
    ),
}


@pytest.mark.parametrize(("rest", "low", "place", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refusal_names_file_and_line(
    build: Build, rest: str, low: str, place: str, sentence: str
) -> None:
    """Code that means something else in one file ends the build with a sentence."""
    with pytest.raises(Refusal, match=rf"^pack/{place}: .*{sentence}"):
        build(rest, low=low)


@pytest.mark.parametrize(
    "again",
    [
        "def name(): ...",
        "async def name(): ...",
        "class name: ...",
        "name = 1",
        "x, (y, *name) = range(3), 4",
        "name: int = 1",
        "name: int",
        "for name in (): ...",
        "with open('x') as name: ...",
        "if (name := 1): ...",
        "xs = [(name := x) for x in ()]",
        "try: x = 1\nexcept OSError as name: ...",
        "if True:\n    import os as name",
        "def x():\n    global name\n    name = 1",
    ],
)
def test_name_of_two_modules_is_refused(build: Build, again: str) -> None:
    """Whatever statement binds a name at the top level, the name is taken."""
    text = f"mid = 1\n{again}\n"
    line = next(n for n, row in enumerate(text.split("\n"), 1) if re.search(r"\bname\b", row))
    sentence = rf"^pack/mid\.py:{line}: name is also defined at pack/low\.py:2$"
    with pytest.raises(Refusal, match=sentence):
        build(MID, low="low = 1\nname = 2\n", mid=text)


@pytest.mark.parametrize(
    "function",
    [
        "def one(low):\n    from pack.low import low\n\n    return low\n",
        "def one():\n    from pack.low import low\n\n    low = 1\n    return low\n",
        "def one(low):\n    def two():\n        from pack.low import low\n\n        return low\n",
        "def one():\n    from pack.low import low\n\n    def two():\n        nonlocal low\n",
        "def one():\n    global low\n    from pack.low import low\n",
        "def one():\n    from pack.low import low\n    from os import sep as low\n",
    ],
)
def test_late_import_of_a_local_name_is_refused(build: Build, function: str) -> None:
    """Without the import, the name would be that of the function, not of the module."""
    with pytest.raises(Refusal, match=r"^pack/main\.py:\d+: line \d+ imports low from the package"):
        build(f"\n\n{function}", low="low = 1\n")


@pytest.mark.parametrize("name", ["__init__", "sub__in___init__"])
def test_init_with_code_is_refused(build: Build, name: str) -> None:
    """Packages hold a docstring alone: their code would run on import, and not in one file."""
    with pytest.raises(Refusal, match=r"^pack/(sub/)?__init__\.py:3: an __init__\.py has a doc"):
        build(
            "\nfrom pack.sub.low import low\n",
            sub__in_low="low = 1\n",
            **{"sub__in___init__": "", name: '"""Pack."""\n\nx = 1\n'},
        )


def test_entry_has_its_form(build: Build, tmp_path: Path) -> None:
    """The entry has a docstring, a head free of the package, and a `__main__` block at its end."""
    with pytest.raises(Refusal, match=r"^pack/main\.py:1: the entry has to start with a docstring"):
        build(head="import os\n")
    with pytest.raises(Refusal, match=r"^pack/main\.py:9: the head must not import"):
        build(head=HEAD.replace("import gc", "from pack.low import low"), low="low = 1\n")
    (tmp_path / ENTRY).write_text('"""The program."""\nx = 1\n')
    with pytest.raises(Refusal, match=r"^pack/main\.py:2: the entry has to end with"):
        amalgamate.amalgamation(tmp_path, ENTRY)
    (tmp_path / ENTRY).unlink()
    with pytest.raises(Refusal, match=r"^pack/main\.py: there is no such file"):
        amalgamate.amalgamation(tmp_path, ENTRY)


def test_command_writes_and_the_result_runs(build: Build, tmp_path: Path) -> None:
    """The written file is executable, the same every time, and does what the package does."""
    build("\nfrom pack.low import low\n\nlow()\n", low="def low(): print('low')\n")
    where = ("--root", tmp_path, "--entry", ENTRY)
    out = tmp_path / "ssh_proxy_command.py"
    assert run(TOOL, *where).returncode == 0
    assert os.access(out, os.X_OK)
    assert run("-I", out).stdout == "low\n7\n"
    first = out.read_bytes()
    assert run(TOOL, *where, "--output", tmp_path / "again.py").returncode == 0
    assert (tmp_path / "again.py").read_bytes() == first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-1],
        lambda text: text[: len(text) // 2],
        lambda text: text + b"\n",
        lambda text: b" " + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text + b"\xff",
        lambda text: b"",
        lambda text: None,
    ],
    ids=["tail", "half", "extra_line", "extra_byte", "line_ends", "no_utf8", "empty", "missing"],
)
def test_check_compares_the_whole_text(
    build: Build,
    tmp_path: Path,
    spoil: Callable[[bytes], bytes | None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each difference is told in one line, and the file stays as it is."""
    text = build().encode()
    out = tmp_path / "ssh_proxy_command.py"
    args = ["--check", "--root", str(tmp_path), "--entry", ENTRY]
    out.write_bytes(text)
    assert amalgamate.main(args) == 0
    assert capsys.readouterr() == ("", "")
    spoilt = spoil(text)
    out.unlink()
    if spoilt is not None:
        out.write_bytes(spoilt)
    assert amalgamate.main(args) == 1
    sentence = "ssh_proxy_command.py is not what pack/ makes: run `make amalgamate`\n"
    assert capsys.readouterr().err == sentence
    assert (out.read_bytes() if out.exists() else None) == spoilt


def test_refused_build_leaves_the_file(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal is one line and exit code 1; nothing is written."""
    build()
    (tmp_path / ENTRY).write_text(HEAD + "\nimport pack\n" + TAIL)
    assert amalgamate.main(["--root", str(tmp_path), "--entry", ENTRY]) == 1
    assert re.fullmatch(r"pack/main\.py:15: .*\n", capsys.readouterr().err)
    assert not (tmp_path / "ssh_proxy_command.py").exists()

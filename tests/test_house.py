"""The house is in order: floors, imports, docstrings, the README's two commands."""

import ast
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from numpydoc.validate import validate

import kermes

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kermes"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FUNCTIONS = [f"kermes.{name}" for name in kermes.__all__ if inspect.isfunction(getattr(kermes, name))]
CLASSES = [f"kermes.{name}" for name in kermes.__all__ if inspect.isclass(getattr(kermes, name))]


def imported(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno} imports relatively"
            names.add(node.module or "")
    return names


def distributions(requirements: list[str]) -> set[str]:
    """Bare names of requirements such as "numpy>=2.1"."""
    return {re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def test_every_file_imports_only_from_its_own_floor_and_those_below():
    # In a process of its own, because import-linter disables all loggers that exist.
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("file", sorted((SOURCE / "kernels").glob("*.py")), ids=lambda file: file.stem)
def test_kernels_import_only_what_can_be_compiled(file):
    allowed = {"__future__", "math", "numba", "numpy", "rocket_fft", "scipy", "typing"}
    foreign = {name for name in imported(file) if not f"{name}.".startswith("kermes.kernels.")}
    assert {name.partition(".")[0] for name in foreign} <= allowed


def test_the_source_imports_only_the_standard_library_and_declared_dependencies():
    providers = importlib.metadata.packages_distributions()
    # What an extra declares may be imported inside the functions that need it, see below.
    extras = PROJECT["optional-dependencies"]
    declared = distributions([*PROJECT["dependencies"], *extras["photometry"]])
    undeclared = {
        (file.relative_to(SOURCE), name)
        for file in SOURCE.rglob("*.py")
        for name in {name.partition(".")[0] for name in imported(file)} - {"kermes"}
        if name not in sys.stdlib_module_names
        and not declared & {provider.lower() for provider in providers.get(name, [])}
    }
    # What two extras bring is imported in one package each, which nothing else imports: the middleware of LSST with
    # what it rests on, and the server of the viewer.
    allowed = {
        "lsst": {"lsst", "starlink", "astro_metadata_translator"},
        "viewer": {"starlette", "uvicorn", "anyio", "PIL"},
    }
    for folder, names in allowed.items():
        inside = {(file, name) for file, name in undeclared if file.parts[0] == folder}
        assert {name for _, name in inside} <= names
        undeclared -= inside
    assert undeclared == set()


def test_the_public_names_bring_in_no_extra():
    code = """if True:
        import json, sys, kermes
        for name in kermes.__all__:
            getattr(kermes, name)
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    """
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    providers = importlib.metadata.packages_distributions()
    loaded = {provider.lower() for name in json.loads(output) for provider in providers.get(name, [])}
    extras = {name for extra in PROJECT["optional-dependencies"].values() for name in distributions(extra)}
    extras -= {"kermes"}  # an extra may name another one
    assert not loaded & extras


def test_version_is_that_of_the_installed_package():
    assert kermes.__version__ == importlib.metadata.version("kermes") == PROJECT["version"]


def problems(name: str, *codes: str) -> list[str]:
    """What numpydoc finds wrong with a docstring, of these codes."""
    return [f"{code} {text}" for code, text in validate(name)["errors"] if code in codes]


# No docstring, no summary, unknown or misplaced sections, parameters that do not exist.
ANY = ("GL06", "GL07", "GL08", "SS01", "PR02", "PR03")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_document_what_goes_in_and_comes_out(name):
    assert problems(name, *ANY, "SS03", "PR01", "PR04", "RT01", "YD01") == []


@pytest.mark.parametrize("name", CLASSES)
def test_public_classes_document_themselves_and_their_members(name):
    members = [
        f"{name}.{member}"
        for member, attribute in vars(getattr(kermes, name.removeprefix("kermes."))).items()
        if not member.startswith("_") and (inspect.isroutine(attribute) or isinstance(attribute, property))
    ]
    assert {name: wrong for name in [name, *members] if (wrong := problems(name, *ANY))} == {}


def test_readme_has_exactly_the_two_set_up_commands():
    commands = re.findall(r"^\s*(.*pip install.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert commands == ["pip install . && kermes demo", "pip install '.[test]' && pytest"]


def test_extras_are_imported_only_inside_functions():
    extras = {"photutils"}
    for file in SOURCE.rglob("*.py"):
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in names} & extras, file.name

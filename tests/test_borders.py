"""Who may import whom: the folders keep their borders, and nothing goes in a circle."""
import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("sd/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in FILES}
# the critic's factory, and what is about the embedded task itself
TASK = {"sd.conditions", "sd.controls", "sd.metrics", "sd.pretrain", "sd.study.gap", "sd.study.ledger"}


def imports(path):
    """The modules of the project, and names in them, that a file imports: sd, sd.UserError, …"""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in ("sd", "train", "eval"))


def module_of(name):
    """sd.UserError -> sd: the longest part of the name that is a module."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


GRAPH = {name: {module_of(found) for found in imports(path)} for name, path in MODULES.items()}


def test_the_language_model_knows_nothing_of_the_method():
    inner = {name: path for name, path in MODULES.items() if name.startswith("sd.llm")}
    assert len(inner) >= 6
    for name, path in inner.items():
        for found in imports(path):
            assert found == "sd.UserError" or found.startswith("sd.llm."), (name, found)


def test_the_embedded_task_can_be_replaced():
    users = {name for name, used in GRAPH.items() if any(module.startswith("sd.task.") for module in used)}
    outside = {name for name in users if not name.startswith("sd.task")}
    assert "sd.conditions" in outside and outside <= TASK


def test_no_module_imports_itself_in_a_circle():
    begun, done = [], set()

    def visit(name):
        assert name not in begun, begun[begun.index(name):] + [name]
        if name not in done:
            begun.append(name)
            for used in GRAPH[name] - {name}:
                visit(used)
            done.add(begun.pop())
    for name in GRAPH:
        visit(name)
    assert done == set(MODULES) >= {"sd", "sd.llm.model", "sd.task.symbolic", "sd.run.runs", "train", "eval"}

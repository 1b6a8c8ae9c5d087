"""python -m fused_critic doctor, on small trainers and integrations written for it."""

from __future__ import annotations

import json
import sys

import pytest
from fused_critic import integrations
from fused_critic.__main__ import main

TRAINER = "def loss(values, clip=0.2): pass\nfrom collections import Counter as unrelated\nprint('a banner')\n"
INTEGRATION = """
from fused_critic.integrations._adapter import Adapter, Replacement
def loss(values, clip=0.2): pass
def helper(x, y=3): pass
__all__ = ["loss", "helper", "install"]
ADAPTER = Adapter("A Trainer", distribution="A-Trainer", version="1.2.3", replacements=[{replacements}])
install, uninstall = ADAPTER.install, ADAPTER.uninstall
"""
PATCHED = 'Replacement("fake_trainer.core:loss", loss)'


@pytest.fixture
def write(monkeypatch, tmp_path):
    """write(path, source): a module of a trainer, or an integration of this package; importable as long as the test runs."""
    for folder in ("site", "integrations"):
        (tmp_path / folder).mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path / "site")
    integrations.__path__.append(str(tmp_path / "integrations"))

    def write(path, source):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)

    yield write
    integrations.__path__.remove(str(tmp_path / "integrations"))
    for name in set(sys.modules) - before:
        if name.startswith(
            ("fake_trainer", "fused_critic.integrations.a_trainer", "fused_critic.integrations.b_", "fused_critic.integrations.c_")
        ):
            del sys.modules[name]
            vars(integrations).pop(name.rpartition(".")[2], None)


@pytest.fixture
def trainer(write):
    """An integration and the trainer that it fits."""
    write("integrations/a_trainer.py", INTEGRATION.format(replacements=PATCHED))
    write("site/fake_trainer/__init__.py", "")
    write("site/fake_trainer/core.py", TRAINER)
    write("site/A_Trainer-1.2.4.dist-info/METADATA", "Metadata-Version: 2.1\nName: A-Trainer\nVersion: 1.2.4\n")
    return write


def doctor(capsys, *arguments):
    """Exit status, standard output, standard error."""
    status = main(["doctor", *arguments])
    return status, *capsys.readouterr()


def test_a_trainer_that_fits(trainer, capsys):
    trainer("site/fake_trainer/__init__.py", "from fake_trainer.core import loss as critic_loss")
    status, out, _ = doctor(capsys, "a_trainer")
    assert status == 0
    assert out.splitlines() == [
        "A Trainer (A-Trainer): 1.2.4 installed, compared with 1.2.3: its own code, executed in the tests",
        "fake_trainer.core:loss: fits; replaced would be",
        "  fake_trainer.core.loss",
        "  fake_trainer.critic_loss",
        "fits: fused_critic.integrations.a_trainer.install() replaces what is named above",
    ]


def test_nothing_is_replaced(trainer, capsys):
    doctor(capsys, "a_trainer")
    core, ours = sys.modules["fake_trainer.core"], sys.modules["fused_critic.integrations.a_trainer"]
    assert core.loss is not ours.loss
    with ours.install():
        status, out, _ = doctor(capsys, "a_trainer")
        assert core.loss is ours.loss
    assert status == 0 and "fake_trainer.core:loss: is ours already\n" in out


@pytest.mark.parametrize(
    "source, theirs",
    [
        ("def loss(values, clip_range=0.2): pass", "(values, clip_range=0.2)"),
        ("", "missing"),
        (None, "missing"),
        ("loss = 3", "no signature: 3"),
    ],
    ids=["other signature", "missing function", "missing module", "no function"],
)
def test_a_trainer_that_does_not_fit(trainer, capsys, tmp_path, source, theirs):
    if source is None:
        (tmp_path / "site/fake_trainer/core.py").unlink()
    else:
        trainer("site/fake_trainer/core.py", source)
    status, out, _ = doctor(capsys, "a_trainer")
    assert status == 1
    assert out.splitlines()[2:] == [
        f"  theirs: {theirs}",
        "  ours:   (values, clip=0.2)",
        "does not fit: install() would raise an error and replace nothing",
    ]


def test_a_trainer_that_is_not_installed(write, capsys):
    write("integrations/a_trainer.py", INTEGRATION.format(replacements=PATCHED))
    status, out, err = doctor(capsys, "a_trainer")
    assert (status, err) == (2, "")
    assert out.splitlines() == [
        "A Trainer (A-Trainer): none installed, compared with 1.2.3: its own code, executed in the tests",
        "not installed",
    ]


def test_what_a_trainer_was_compared_by(write, capsys):
    """Formulas are not the trainer's code."""
    adapter = INTEGRATION.format(replacements=PATCHED).replace('version="1.2.3"', 'version="1.2.3", evidence="formulas only"')
    write("integrations/a_trainer.py", adapter)
    assert doctor(capsys, "a_trainer")[1].startswith("A Trainer (A-Trainer): none installed, compared with 1.2.3: formulas only\n")
    assert json.loads(doctor(capsys, "a_trainer", "--json")[1])["evidence"] == "formulas only"
    assert "formulas only; its code is in no wheel and was not executed" in doctor(capsys, "nemo_rl")[1]


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("raise RuntimeError('no GPU\\n  is there')", "RuntimeError: no GPU is there"),
        ("def broken(", "SyntaxError: "),
    ],
    ids=["missing dependency", "error", "syntax"],
)
def test_a_trainer_that_cannot_be_imported(trainer, capsys, source, reason):
    """One line with the reason, no traceback."""
    trainer("site/fake_trainer/core.py", source)
    status, out, err = doctor(capsys, "a_trainer")
    assert status == 1 and len(out.splitlines()) == 2 and not err
    assert out.splitlines()[1].startswith(f"cannot be imported: {reason}")


def test_a_trainer_with_functions_only(write, capsys):
    write("integrations/a_trainer.py", INTEGRATION.format(replacements=""))
    status, out, _ = doctor(capsys, "a_trainer")
    assert status == 0
    assert out.splitlines()[1:] == [
        "nothing is replaced; fused_critic.integrations.a_trainer has functions to call:",
        "  loss(values, clip=0.2)",
        "  helper(x, y=3)",
    ]


@pytest.mark.parametrize("name", ["a_trainer", "a-trainer", "A-Trainer"])
def test_names(trainer, capsys, name):
    assert doctor(capsys, name)[0] == 0


def test_an_unknown_trainer(trainer, capsys):
    status, out, err = doctor(capsys, "no_such_trainer")
    assert (status, out) == (2, "")
    assert err.startswith("unknown trainer 'no_such_trainer'; known: a_trainer, ") and "verl" in err and "autoinstall" not in err


def lines(capsys, *names):
    """The table's lines of these trainers."""
    status, out, _ = doctor(capsys)
    return status, {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.split()[0] in names}


def test_all_trainers(trainer, capsys):
    trainer("integrations/b_trainer.py", INTEGRATION.format(replacements=""))
    trainer("integrations/c_trainer.py", INTEGRATION.format(replacements='Replacement("no_such_package:loss", loss)'))
    trainer("integrations/c_no_adapter.py", "")
    trainer("integrations/c_autoinstall.py", "raise AssertionError('imported for its effect')")
    trainer("integrations/_c_private.py", "raise AssertionError('not public')")
    status, found = lines(capsys, "a_trainer", "b_trainer", "c_trainer", "c_no_adapter")
    assert status == 0, "what is not installed does not count"
    assert {name: line.split("  ")[0] for name, line in found.items()} == {
        "a_trainer": "fits", "b_trainer": "functions only", "c_trainer": "not installed",
    }  # fmt: skip
    assert found["a_trainer"].endswith("1.2.4 installed, compared with 1.2.3: its own code, executed in the tests")
    trainer("site/fake_trainer/core.py", "import no_such_dependency")
    del sys.modules["fake_trainer.core"]
    status, found = lines(capsys, "a_trainer")
    assert status == 1 and found["a_trainer"].endswith("(ModuleNotFoundError: No module named 'no_such_dependency')")


def test_json(trainer, capsys):
    status, out, err = doctor(capsys, "a_trainer", "--json")
    assert status == 0 and err == "a banner\n", "what the trainer prints is not in the JSON"
    assert json.loads(out) == {
        "trainer": "a_trainer",
        "name": "A Trainer",
        "distribution": "A-Trainer",
        "installed_version": "1.2.4",
        "compared_version": "1.2.3",
        "evidence": "its own code, executed in the tests",
        "status": "fits",
        "reason": None,
        "functions": {},
        "replacements": [
            {
                "target": "fake_trainer.core:loss",
                "theirs": "(values, clip=0.2)",
                "ours": "(values, clip=0.2)",
                "fits": True,
                "installed": False,
                "places": ["fake_trainer.core.loss"],
            }
        ],
    }
    status, out, _ = doctor(capsys, "--json")
    assert {"a_trainer", "verl"} <= {diagnosis["trainer"] for diagnosis in json.loads(out)}

"""How trainers are patched: Adapter on small trainers made here, their modules put into sys.modules."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
from fused_critic.integrations._adapter import Adapter, Replacement

SOURCE = """
def loss(values, returns, clip=0.2): return "theirs"
def advantages(rewards, *, gamma): return "theirs"
class Base:
    def inherited(self, x): return "theirs"
class Maker(Base):
    def method(self, x, y=None): return "theirs"
    @staticmethod
    def static(x): return "theirs"
    @classmethod
    def of_class(cls, x): return cls.__name__ + " theirs"
class Derived(Maker):
    pass
ESTIMATORS = {"gae": advantages, "other": loss, 3: advantages}
"""


def our_loss(values, returns, clip: float = 0.2) -> str:
    return "ours"


def our_advantages(rewards, *, gamma):
    return "ours"


def our_method(self, x, y=None):
    return "ours"


def our_one(x):
    return "ours"


def our_of_class(cls, x):
    return cls.__name__ + " ours"


def our_inherited(self, x):
    return "ours"


ALL = {
    "trainer.core:loss": our_loss,
    "trainer.core:advantages": our_advantages,
    "trainer.core:Maker.method": our_method,
    "trainer.core:Maker.static": our_one,
    "trainer.core:Maker.of_class": our_of_class,
    "trainer.core:Maker.inherited": our_inherited,
}


def add_module(monkeypatch, name, source=""):
    module = types.ModuleType(name)
    module.__path__ = []
    monkeypatch.setitem(sys.modules, name, module)
    exec(source, vars(module))
    return module


@pytest.fixture
def core(monkeypatch):
    """The module that defines everything, and two that import from it: one of the trainer, one of its user."""
    add_module(monkeypatch, "trainer")
    core = add_module(monkeypatch, "trainer.core", SOURCE)
    add_module(monkeypatch, "trainer.worker", "from trainer.core import loss, advantages as gae, Maker")
    add_module(monkeypatch, "script", "from trainer.core import loss as value_loss")
    return core


def adapter_of(*targets, **keywords):
    replacements = [Replacement(target, ALL[target]) for target in targets or ALL]
    return Adapter("Trainer", "no-such-distribution", "1.2", replacements, registries=["trainer.core:ESTIMATORS"], **keywords)


def state():
    """Everything that install() may touch, as it is stored."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("trainer", "script")]
    modules = {name: dict(vars(sys.modules[name])) for name in names}
    core = sys.modules["trainer.core"]
    classes = {name: dict(vars(x)) for name, x in vars(core).items() if isinstance(x, type)}
    return modules, classes, dict(core.ESTIMATORS)


def answers(core):
    maker = core.Derived()
    return [core.loss(1, 2), core.advantages(1, gamma=1), maker.method(1), maker.static(1), maker.of_class(1), maker.inherited(1)]


def test_everything_is_replaced_and_put_back(core):
    before = state()
    adapter = adapter_of()
    maker, theirs = core.Maker(), answers(core)
    assert theirs == ["theirs"] * 4 + ["Derived theirs", "theirs"]
    adapter.install()
    assert answers(core) == ["ours"] * 4 + ["Derived ours", "ours"]
    assert (maker.method(1), maker.static(1), core.Maker.static(1), core.Maker.of_class(1)) == ("ours", "ours", "ours", "Maker ours")
    assert core.Base().inherited(1) == "theirs"
    worker = sys.modules["trainer.worker"]
    assert (worker.loss, worker.gae, sys.modules["script"].value_loss) == (our_loss, our_advantages, our_loss)
    assert core.ESTIMATORS == {"gae": our_advantages, "other": our_loss, 3: our_advantages}
    adapter.uninstall()
    assert state() == before
    assert answers(core) == theirs
    assert "inherited" not in vars(core.Maker)
    adapter.uninstall()
    assert state() == before


def test_registries(core):
    """A module's, a class's, and ones that the trainer does not have."""
    core.Maker.functions = {"first": core.loss}
    registries = [f"trainer.core:{name}" for name in ("Maker.functions", "ESTIMATORS", "GONE", "Gone.functions")] + [
        "trainer.gone:FUNCTIONS"
    ]
    adapter = Adapter("Trainer", "no-such-distribution", "1.2", [Replacement("trainer.core:loss", our_loss)], registries)
    theirs = core.loss
    assert {"trainer.core:Maker.functions['first']", "trainer.core:ESTIMATORS['other']"} < set(adapter.examine()[0].places)
    with adapter.install():
        assert core.Maker.functions["first"] is core.ESTIMATORS["other"] is our_loss
    assert core.Maker.functions["first"] is core.ESTIMATORS["other"] is theirs


def test_one_function_for_several_targets(core):
    """Of which each gets its own back."""
    core.same = lambda values, returns, clip=0.2: "the same"
    before = state()
    adapter = Adapter(
        "Trainer", "no-such-distribution", "1.2", [Replacement(f"trainer.core:{name}", our_loss) for name in ("loss", "same")]
    )
    with adapter.install():
        assert core.loss is core.same is our_loss
    assert state() == before


def test_a_second_install_changes_nothing(core):
    before = state()
    adapter = adapter_of()
    adapter.install()
    installed = state()
    with adapter.install():
        assert state() == installed
    assert state() == installed
    adapter.uninstall()
    assert state() == before


def test_a_block_undoes_what_it_did(core):
    before = state()
    with adapter_of().install():
        assert core.Derived().method(1) == "ours"
        exec("from trainer.core import loss as late", vars(sys.modules["trainer.worker"]))
    assert sys.modules["trainer.worker"].late is core.loss
    del sys.modules["trainer.worker"].late
    assert state() == before


def test_a_block_is_undone_when_it_raises(core):
    before = state()
    with pytest.raises(KeyError), adapter_of().install():
        raise KeyError
    assert state() == before


def test_a_block_within_an_installation_undoes_its_own_part_only(core):
    """Somebody assigns one function anew; the block replaces that one, and leaves the rest installed."""
    adapter = adapter_of()
    adapter.install()
    installed = state()

    def somebodys(values, returns, clip=0.2):
        return "somebody's"

    core.loss = core.ESTIMATORS["other"] = somebodys
    with adapter.install():
        assert state() == installed
    assert core.loss is core.ESTIMATORS["other"] is somebodys
    assert sys.modules["trainer.worker"].loss is our_loss
    assert answers(core)[1:] == ["ours"] * 3 + ["Derived ours", "ours"]
    adapter.uninstall()
    assert core.loss is somebodys
    assert sys.modules["trainer.worker"].loss("", "") == "theirs"


def test_uninstall_within_a_block(core):
    before = state()
    adapter = adapter_of()
    with adapter.install():
        adapter.uninstall()
        assert state() == before
        adapter.install()
        installed = state()
    assert state() == installed, "this installation is not the block's"
    adapter.uninstall()
    assert state() == before


def test_uninstall_keeps_what_others_assigned(core):
    adapter = adapter_of()
    adapter.install()
    core.loss = core.ESTIMATORS["gae"] = core.Maker.method = core.Maker.static = core.Maker.inherited = max
    sys.modules["script"].own = our_loss
    adapter.uninstall()
    assert all(x is max for x in (core.loss, core.ESTIMATORS["gae"], core.Maker.method, core.Maker.static, core.Maker.inherited))
    assert sys.modules["script"].own is our_loss, "not the trainer's module"
    assert core.advantages(1, gamma=1) == core.Maker.of_class(1).split()[1] == "theirs"


def test_uninstall_reaches_modules_imported_since(core, monkeypatch):
    theirs = core.loss
    adapter = adapter_of()
    adapter.install()
    late = add_module(monkeypatch, "trainer.late", "from trainer.core import loss as value_loss, Maker")
    core.ESTIMATORS["late"] = core.loss
    assert late.value_loss is our_loss
    adapter.uninstall()
    assert late.value_loss is core.ESTIMATORS["late"] is theirs


def test_a_trainer_that_is_imported_anew(core):
    """Its functions are other ones then: install() replaces those, and uninstall() puts back the newest."""
    adapter = adapter_of("trainer.core:loss", "trainer.core:Maker.method")
    old = core.loss
    adapter.install()
    exec(SOURCE, vars(core))
    new = core.loss
    assert core.Maker().method(1) == "theirs" and new is not old
    adapter.install()
    assert core.loss is our_loss and core.Maker().method(1) == "ours"
    sys.modules["trainer.worker"].late = core.loss
    adapter.uninstall()
    assert core.loss is sys.modules["trainer.worker"].late is new
    assert sys.modules["trainer.worker"].loss is old
    assert core.Maker().method(1) == "theirs"


def test_two_adapters_do_not_meddle(core):
    before = state()
    first, second = adapter_of("trainer.core:loss"), adapter_of("trainer.core:advantages")
    with first.install():
        with second.install():
            assert answers(core)[:2] == ["ours", "ours"]
        assert answers(core)[:2] == ["ours", "theirs"]
    assert state() == before


@pytest.mark.parametrize("target", ALL)
def test_another_signature(core, target):
    """Both signatures are in the message, and nothing at all is replaced."""

    def other(values, returns, clip_range=0.25):
        pass

    *classes, name = target.partition(":")[2].split(".")
    setattr(getattr(core, classes[0]) if classes else core, name, other)
    before = state()
    with pytest.raises(RuntimeError) as error:
        adapter_of().install()
    message = str(error.value)
    assert target in message and "(values, returns, clip_range=0.25)" in message
    ours = {our_loss: "(values, returns, clip: 'float' = 0.2) -> 'str'"}.get(ALL[target], "(")
    assert f"fused_critic's: {ours}" in message and "version unknown" in message and "1.2" in message
    assert state() == before


@pytest.mark.parametrize("source", ["def loss(values, returns, clip=0.3): pass", "def loss(values, returns, *, clip=0.2): pass"])
def test_defaults_and_kinds_are_part_of_the_signature(core, source):
    exec(source, vars(core))
    with pytest.raises(RuntimeError, match="trainer.core:loss"):
        adapter_of().install()


def test_a_method_of_another_kind_is_another_signature(core):
    core.Maker.method = staticmethod(lambda x, y=None: None)
    with pytest.raises(RuntimeError, match=r"method.*\n.*\(x, y=None\)"):
        adapter_of().install()


@pytest.mark.parametrize("target", [target for target in ALL if "inherited" not in target])
def test_a_missing_function(core, target):
    exec(f"del {target.partition(':')[2]}", vars(core))
    before = state()
    with pytest.raises(RuntimeError, match=f"{target}.*\n.*missing"):
        adapter_of().install()
    assert state() == before


@pytest.mark.parametrize("target", ["trainer.core:Gone.__init__", "trainer.gone:loss", "trainer.gone.deeper:loss", "trainer.core:loss.x"])
def test_a_missing_class_or_module(core, target):
    adapter = Adapter("Trainer", "no-such-distribution", "1.2", [Replacement(target, our_loss)])
    with pytest.raises(RuntimeError, match="missing"):
        adapter.install()
    assert [(finding.fits, finding.theirs, finding.places) for finding in adapter.examine()] == [(False, None, ())]


def test_what_is_no_function_does_not_fit(core):
    core.loss = 3
    with pytest.raises(RuntimeError, match="no signature: 3"):
        adapter_of().install()


def test_a_trainer_that_is_not_installed():
    with pytest.raises(ModuleNotFoundError, match="no_such_trainer"):
        Adapter("Trainer", "no-such-distribution", "1.2", [Replacement("no_such_trainer.core:loss", our_loss)]).install()


def test_a_trainer_whose_dependency_is_missing(monkeypatch, tmp_path):
    (tmp_path / "needy_trainer.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        Adapter("Trainer", "no-such-distribution", "1.2", [Replacement("needy_trainer:loss", our_loss)]).install()


def test_a_failure_half_way_replaces_nothing(core):
    class Refusing(dict):
        def __setitem__(self, key, value):
            if key == 3 and value is our_advantages:
                raise OSError("read only")
            super().__setitem__(key, value)

    core.ESTIMATORS = Refusing(core.ESTIMATORS)
    before = state()
    adapter = adapter_of("trainer.core:loss", "trainer.core:Maker.static", "trainer.core:advantages")
    with pytest.raises(OSError, match="read only"):
        adapter.install()
    assert state() == before
    adapter.uninstall()
    assert state() == before


def test_a_function_that_a_module_gives_on_demand(core):
    """PEP 562: the attribute is in nobody's namespace until somebody takes it."""
    theirs = core.loss
    del core.loss
    core.__getattr__ = {"loss": theirs}.__getitem__
    adapter = adapter_of("trainer.core:loss")
    with adapter.install():
        assert core.loss is sys.modules["trainer.worker"].loss is our_loss
    assert core.loss is sys.modules["trainer.worker"].loss is theirs and "loss" not in vars(core)


def test_the_trainer_is_imported_when_it_is_not_yet(monkeypatch, tmp_path):
    (tmp_path / "lazy_trainer.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    adapter = Adapter("Trainer", "no-such-distribution", "1.2", [Replacement("lazy_trainer:loss", our_loss)])
    assert "lazy_trainer" not in sys.modules
    try:
        with adapter.install():
            assert importlib.import_module("lazy_trainer").loss is our_loss
    finally:
        sys.modules.pop("lazy_trainer", None)


def test_examine_changes_nothing_and_tells_what_install_will_do(core):
    before = state()
    adapter = adapter_of()
    findings = {finding.target: finding for finding in adapter.examine()}
    assert state() == before
    assert all(finding.fits and not finding.installed for finding in findings.values())
    assert set(findings["trainer.core:loss"].places) == {
        "trainer.core.loss", "trainer.worker.loss", "script.value_loss", "trainer.core:ESTIMATORS['other']",
    }  # fmt: skip
    assert findings["trainer.core:loss"].places[0] == "trainer.core.loss"
    assert findings["trainer.core:Maker.method"].places == ("trainer.core.Maker.method",)
    assert (findings["trainer.core:loss"].theirs, findings["trainer.core:Maker.of_class"].ours) == (
        "(values, returns, clip=0.2)",
        "(cls, x)",
    )
    adapter.install()
    installed = state()
    assert all(finding.installed and finding.fits and not finding.places for finding in adapter.examine())
    assert state() == installed
    adapter.uninstall()


def test_versions(core):
    assert adapter_of().installed_version() is None
    assert Adapter("pytest", "pytest", "1").installed_version() == pytest.__version__

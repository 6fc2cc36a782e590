import pytest

from jaxstack.core.errors import UnknownName, UserError
from jaxstack.core.registry import Registry


def table():
    return Registry("thing", {"path": "os.path:join", "broken": "no_such_module_here:x", "sqrt": "math:sqrt"})


def test_it_is_a_mapping_that_loads_when_asked():
    things = table()
    assert list(things) == ["path", "broken", "sqrt"]
    assert len(things) == 3
    assert "sqrt" in things
    assert "sqr" not in things
    assert things.load("sqrt")(9) == 3
    with pytest.raises(ModuleNotFoundError):
        things.load("broken")


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnknownName, match="unknown thing 'sqrtt': did you mean 'sqrt'"):
        table().load("sqrtt")
    with pytest.raises(KeyError):
        table()["x"]


def test_names_are_added_once():
    things, source = table(), {"a": "math:sin"}
    things.add("cos", "math:cos")
    things.add("cos", "math:cos")
    assert things.load("cos")(0) == 1
    with pytest.raises(UserError, match="'cos' is already registered as 'math:cos'"):
        things.add("cos", "math:sin")
    things.add("cos", "math:sin", overwrite=True)
    assert things.load("cos")(0) == 0
    things.add("lost", "no_such_module:x")
    with pytest.raises(UserError, match="thing 'lost': no module named 'no_such_module' is found"):
        things.load("lost")
    copy = Registry("thing", source)
    copy.add("b", "math:cos")
    assert source == {"a": "math:sin"}


@pytest.mark.parametrize("target", ["math", "math:sin:x", ""])
def test_targets_have_a_form(target):
    with pytest.raises(UserError, match="must have the form 'module:attribute'"):
        table().add("new", target)

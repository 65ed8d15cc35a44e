"""Options of the policy: what is accepted, and what the refusal says."""

import argparse

import pytest

from razor_vllm.config import RazorConfig, config_of
from razor_vllm.flags import options_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "half"}, "policy is 'half'; accepted are full, razor"),
        ({"prefill": "lazy"}, "prefill is 'lazy'; accepted are exact, chat, windowed"),
        ({"window": -1}, "window is -1"),
        ({"window": 12.5}, "window is 12.5"),
        ({"window": "4096"}, "window is '4096'"),
        ({"window": True}, "window is True"),
        ({"sinks": -4}, "sinks is -4"),
        ({"sinks": None}, "sinks is None"),
        ({"window_ratio": 1.5}, "window_ratio is 1.5; accepted are numbers from 0 to 1"),
        ({"window_ratio": float("nan")}, "window_ratio is nan"),
        ({"window_ratio": "0.2"}, "window_ratio is '0.2'"),
        ({"head_profile": 7}, "head_profile is 7"),
        ({"compensation": 1}, "compensation is 1"),
        ({"windwo": 3, "sink": 4}, "unknown option sink, windwo; accepted are policy, head_"),
        ("razor", "is 'razor'; accepted is an object"),
        (["window"], "accepted is an object"),
    ],
)
def test_bad_options_name_what_is_accepted(options, message: str) -> None:
    """A refusal says the value and what is accepted."""
    with pytest.raises(ValueError) as error:
        RazorConfig.from_dict(options)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_lengths_above_the_model_are_refused(name: str) -> None:
    """A window that the model can never fill is a mistake."""
    RazorConfig(**{"window": 10, "sinks": 4, name: 100}).check_lengths(100)
    with pytest.raises(ValueError, match=f"{name} is 101, above the model length of 100"):
        RazorConfig(**{"window": 10, "sinks": 4, name: 101}).check_lengths(100)


def test_the_policy_is_on_only_where_asked_for() -> None:
    """No key, or the policy full: None. An object: the policy, unless it says otherwise."""
    assert config_of({}) is None
    assert config_of({"other": 1}) is None
    assert config_of({"razor": {"policy": "full", "window": 64}}) is None
    config = config_of({"razor": {"window": 64}})
    assert config == RazorConfig(window=64)
    assert config.to_dict() == {"policy": "razor", "window": 64}
    assert config_of({"razor": config.to_dict()}) == config


def namespace(**flags: object) -> argparse.Namespace:
    names = ("head_profile", "window", "window_ratio", "sinks", "prefill", "calibrate")
    unset = {f"razor_{name}": None for name in names}
    return argparse.Namespace(**{"kv_policy": None, **unset, **flags})


def test_flags_become_options() -> None:
    """Flags that were not given leave the defaults to the config."""
    assert options_of(namespace()) is None
    assert options_of(namespace(kv_policy="full")) == {"policy": "full"}
    flags = namespace(kv_policy="razor", razor_window=0, razor_prefill="windowed")
    assert options_of(flags) == {"policy": "razor", "window": 0, "prefill": "windowed"}
    with pytest.raises(ValueError, match="accepted are full, razor"):
        options_of(namespace(kv_policy="h2o"))
    with pytest.raises(ValueError, match="--razor-window has no effect without"):
        options_of(namespace(razor_window=64))

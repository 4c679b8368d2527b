"""config.json against the model: both spellings, and one line for what differs."""

import pytest

from paxlike.weights import check_config

EXPECTED = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "sliding_window": None,
}


def test_equal():
    assert check_config(EXPECTED, EXPECTED, source="config.json") == []


def test_the_newer_form_of_the_rotation():
    newer = {k: v for k, v in EXPECTED.items() if k not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}
    assert check_config(newer, EXPECTED, source="config.json") == []
    assert check_config(EXPECTED, newer, source="config.json") == []
    newer["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    with pytest.raises(ValueError, match="rope_scaling is None in config.json and {'rope_type'"):
        check_config(newer, EXPECTED, source="config.json")


def test_yarn_with_and_without_what_goes_without_saying():
    said = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    ours = EXPECTED | {"rope_scaling": {**said, "beta_fast": 32.0, "beta_slow": 1.0}}
    given = EXPECTED | {"rope_scaling": said}
    assert check_config(given, ours, source="config.json") == []
    given["rope_scaling"] = said | {"mscale": 1.0, "mscale_all_dim": 1.0}
    with pytest.raises(
        ValueError, match="rope_scaling is .*'mscale_all_dim': 1.0.* in config.json and"
    ):
        check_config(given, ours, source="config.json")


def test_two_kinds_of_layers():
    local = {"rope_theta": 1e4, "rope_type": "default"}
    given = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": local}}
    older = {"rope_theta": 1e6, "rope_scaling": None, "rope_local_base_freq": 10000.0}
    assert check_config(given, older, source="config.json") == []
    with pytest.raises(ValueError, match=r"rope_local_base_freq is 10000.0 in c.json and 20000"):
        check_config(given, older | {"rope_local_base_freq": 2e4}, source="c.json")


@pytest.mark.parametrize(
    "change,match",
    [
        ({"hidden_size": 4096}, "hidden_size is 4096 in c.json and 2048 .*: set MODEL_DIMS=4096"),
        (
            {"rope_theta": 1e4},
            "rope_theta is 10000.0 in c.json and 500000.0.*set ROPE_THETA=10000.0",
        ),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06 .* and 1e-05 .*set RMS_NORM_EPSILON=1e-06"),
        ({"tie_word_embeddings": True}, "is True in c.json and False .*SEPARATE_EMBEDDING=False"),
        ({"model_type": "gemma2"}, "is 'gemma2' .* and 'llama' .*: take a config of that family"),
        ({"sliding_window": 4096}, "sliding_window is 4096 in .* and None .*SLIDING_WINDOW=4096"),
        (
            {"num_key_value_heads": None, "num_attention_heads": 8},
            "num_attention_heads is 8 .*NUM_HE",
        ),
    ],
)
def test_what_differs(change, match):
    with pytest.raises(ValueError, match=match):
        check_config(EXPECTED | change, EXPECTED, source="c.json")


def test_what_is_implied():
    """No number of key/value heads: as many as heads. No head size: the width over them."""
    short = {k: v for k, v in EXPECTED.items() if k not in ("num_key_value_heads", "head_dim")}
    assert check_config(short, EXPECTED, source="c.json") == []
    unused = EXPECTED | {"sliding_window": 4096, "use_sliding_window": False}
    assert check_config(unused, EXPECTED, source="c.json") == []


def test_mistral_is_llama_with_a_window():
    without = {k: v for k, v in EXPECTED.items() if k != "sliding_window"}
    assert check_config(EXPECTED | {"model_type": "mistral"}, without, source="c.json") == []
    with pytest.raises(ValueError, match="sliding_window is 4096 in c.json and None in this model"):
        check_config(
            EXPECTED | {"model_type": "mistral", "sliding_window": 4096}, without, source="c.json"
        )


def test_rows_may_be_shorter_than_the_model_allows():
    given = EXPECTED | {"max_position_embeddings": 131072}
    assert check_config(given, EXPECTED | {"max_position_embeddings": 4096}, source="c.json") == []


def test_what_it_does_not_say():
    short = {k: v for k, v in EXPECTED.items() if k != "rope_theta"}
    assert check_config(short, EXPECTED, source="c.json") == ["rope_theta"]


def test_text_inside_a_larger_model():
    whole = {"model_type": "gemma3", "text_config": EXPECTED}
    assert check_config(whole, EXPECTED, source="c.json") == []

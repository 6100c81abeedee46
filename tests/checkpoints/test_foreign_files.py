"""Files that save_optimizer did not write: the state of mlx.optimizers is loaded, anything else names the way."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map

import mlx_fused_adam as fused
from support.arrays import assert_same_bits
from support.checkpoints import SETTINGS, rejected, saved, train, tree

pytestmark = pytest.mark.usefixtures("device")

ONE = mx.ones(4)
WAY = r"must hold a file of save_optimizer, or the state of mlx.optimizers' Adam, AdamW or MultiOptimizer as mx.save_"


def by_mlx(path, optimizer, metadata=None):
    arrays = dict(tree_flatten(optimizer.state))
    mx.save_safetensors(str(path), arrays, *([metadata] if metadata else []))


def float32(parameters):
    return tree_map(lambda x: x.astype(mx.float32), parameters)


@pytest.mark.parametrize("metadata", [None, {"epoch": "3"}, {"format": "mlx"}], ids=str)
@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_training_goes_on_from_mlx_optimizers(name, is_initialized, metadata, tmp_path):
    file = tmp_path / "o.safetensors"
    theirs = getattr(optim, name)(1e-2, bias_correction=True)
    parameters = float32(tree())
    for seed in (1, 2):
        parameters = theirs.apply_gradients(float32(tree(seed)), parameters)
    by_mlx(file, theirs, metadata)
    ours = getattr(fused, name)(1e-2, bias_correction=True)
    if is_initialized:
        ours.init(parameters)
    fused.load_optimizer(file, ours)
    expected = theirs.apply_gradients(float32(tree(3)), parameters)
    assert_same_bits(ours.apply_gradients(float32(tree(3)), parameters), expected)
    assert_same_bits(ours.state, theirs.state)


def test_a_state_of_mlx_optimizers_is_converted(tmp_path):
    file = tmp_path / "o.safetensors"
    theirs = optim.AdamW(3e-3)
    parameters = train(theirs, tree(), [1, 2])
    by_mlx(file, theirs)
    for how, rate in (("error", 3e-3), ("file", 3e-3), ("optimizer", 1e-2)):
        ours = fused.AdamW(**SETTINGS, state_dtype="int8", master_weights=True, max_grad_norm=1.0)
        description = ours._description()
        fused.load_optimizer(file, ours, hyperparameters=how)
        train(ours, parameters, [3])
        assert ours.state["a"]["w"].keys() == {"m", "v", "m_scale", "v_scale", "remainder"}
        assert ours.state["a"]["w"]["m"].dtype == mx.int8 and ours.step.item() == 3
        assert ours._description() == description | {"learning_rate": rate}


def test_what_stock_state_gives_is_loaded(tmp_path):
    file = tmp_path / "o.safetensors"
    first = saved(tmp_path / "ours", state_dtype="int8")
    first.init(tree())
    state = fused.stock_state(first)
    mx.save_safetensors(str(file), dict(tree_flatten(state)))
    second, third = fused.AdamW(**SETTINGS), fused.AdamW(**SETTINGS)
    fused.load_optimizer(file, second)
    third.state = state
    assert_same_bits(train(second, tree(), [3]), train(third, tree(), [3]))


def test_other_containers_of_mlx_files_are_the_parameters(tmp_path):
    """tree_unflatten guesses wrong, and MLX's own resume fails."""
    parameters = {"a.w": mx.ones(4), "layers": {"0": mx.ones(3), "1": mx.ones(2)}}
    theirs = optim.Adam(1e-1)
    parameters = theirs.apply_gradients(parameters, parameters)
    by_mlx(tmp_path / "o.safetensors", theirs)
    ours = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o.safetensors", ours)
    expected = theirs.apply_gradients(parameters, parameters)
    assert_same_bits(ours.apply_gradients(parameters, parameters), expected)


def test_mlx_files_of_other_parameters_are_an_error(tmp_path):
    by_mlx_file = tmp_path / "o.safetensors"
    theirs = optim.Adam(1e-1)
    theirs.init({"a": [mx.ones(4)]})
    by_mlx(by_mlx_file, theirs)
    ours = fused.Adam(1e-1)
    fused.load_optimizer(by_mlx_file, ours)
    with pytest.raises(ValueError, match=r"must be those of .*o.safetensors but got a.1, which has no state there"):
        ours.init({"a": [mx.ones(4), mx.ones(4)]})
    initialized = fused.AdamW(**SETTINGS)
    initialized.init({"a": [mx.ones(5)]})
    rejected(by_mlx_file, r"a.0.m of shape \(5,\) but got shape \(4,\)", initialized)


@pytest.mark.parametrize(("arrays", "got"), [
    ({"layers.0.weight": mx.ones(4)}, "something else, without step and learning_rate"),
    ({}, "something else, without step and learning_rate"),
    ({"states.0.step": mx.array(1), "states.0.learning_rate": mx.array(0.1)}, "something else, without step and"),
    ({"step": mx.array(1), "learning_rate": mx.array(0.1), "w.v": ONE}, "v instead of m, v of w"),
    ({"step": mx.array(1), "learning_rate": mx.array(0.1), "w.m": ONE, "w.v": ONE, "w.m_scale": ONE},
     "m, m_scale, v instead of m, v of w"),
], ids=str)  # fmt: skip
def test_other_safetensors_files_name_the_way(arrays, got, tmp_path):
    mx.save_safetensors(str(tmp_path / "o.safetensors"), arrays)
    rejected(tmp_path / "o.safetensors", f"{WAY}.*{got}")


def test_other_formats_name_the_way(tmp_path):
    mx.savez(str(tmp_path / "o.npz"), w=mx.ones(4))
    rejected(
        tmp_path / "o.npz",
        "must hold a whole safetensors file but got an error: .*; it must be a file of save_opt",
    )


@pytest.mark.parametrize(("name", "shape"), [("step", (1,)), ("learning_rate", (2,))])
def test_step_and_learning_rate_must_be_scalars(name, shape, tmp_path):
    arrays = {"step": mx.array(1), "learning_rate": mx.array(0.1), name: mx.ones(shape)}
    mx.save_safetensors(str(tmp_path / "o.safetensors"), arrays)
    rejected(
        tmp_path / "o.safetensors",
        rf"must hold a scalar {name} but got one of shape \({shape[0]},\)",
    )

from __future__ import annotations

import pytest
from pydantic import ValidationError

from prefsel.errors import UserError
from prefsel.train.deepspeed_config import OWNED, build_deepspeed_config, lr_factor
from prefsel.train.run_config import DpoConfig


def config(**options: object) -> DpoConfig:
    required = {"policy_is_reference": True, "learning_rate": 1e-3, "max_length": 128, "dtype": "fp32"}
    return DpoConfig.model_validate({**required, **options})


def test_options_become_deepspeed_keys() -> None:
    built = build_deepspeed_config(
        config(zero_stage=3, offload="optimizer_and_weights", max_grad_norm=0.5, dtype="bf16"), world_size=4
    )
    assert built["zero_optimization"]["stage"] == 3
    assert built["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert built["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert built["gradient_clipping"] == 0.5
    assert built["bf16"] == {"enabled": True}
    assert built["data_types"] == {"grad_accum_dtype": "fp32"}
    assert built["train_batch_size"] == 4


def test_the_users_dictionary_is_merged_key_by_key() -> None:
    built = build_deepspeed_config(
        config(
            zero_stage=2,
            offload="optimizer",
            deepspeed={
                "zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"pin_memory": True}},
                "optimizer": {"params": {"torch_adam": False}},
                "wall_clock_breakdown": True,
            },
        ),
        world_size=1,
    )
    assert built["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": 1000,
    }
    assert built["optimizer"]["type"] == "AdamW"
    assert built["optimizer"]["params"]["torch_adam"] is False
    assert built["optimizer"]["params"]["lr"] == 1e-3
    assert built["wall_clock_breakdown"] is True


@pytest.mark.parametrize("path", sorted(OWNED))
def test_a_key_another_option_decides_is_refused(path: str) -> None:
    options: object = {"enabled": True} if path in ("bf16", "fp16", "amp", "torch_autocast", "scheduler") else 7
    for key in reversed(path.split(".")):
        options = {key: options}
    with pytest.raises(UserError, match=f"deepspeed.{path}.*set "):
        build_deepspeed_config(config(deepspeed=options), world_size=1)


def test_a_plain_value_cannot_replace_a_dictionary() -> None:
    with pytest.raises(UserError, match=r"deepspeed\.zero_optimization: got 3; valid: dict"):
        build_deepspeed_config(config(deepspeed={"zero_optimization": 3}), world_size=1)


def test_unknown_and_contradicting_options_are_refused() -> None:
    with pytest.raises(ValidationError, match="learningrate"):
        config(learningrate=1.0)
    with pytest.raises(ValidationError, match="zero_stage"):
        config(offload="optimizer_and_weights", zero_stage=2)


def test_learning_rate_rises_to_the_peak_then_follows_half_a_cosine() -> None:
    # 10 steps, 2 of warm-up, ending at a tenth: 1/2, 1, then 0.1 + 0.45 * (1 + cos(pi * k / 8)), k = 0 … 7
    factors = [lr_factor(step, num_steps=10, num_warmup_steps=2, min_ratio=0.1) for step in range(10)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert factors[6] == pytest.approx(0.55)
    assert factors[9] == pytest.approx(0.1 + 0.45 * (1 - 0.9238795325112867))
    assert lr_factor(10, num_steps=10, num_warmup_steps=2, min_ratio=0.1) == pytest.approx(0.1)

"""The launcher configs: accelerate reads each, and it asks for what its name says."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file

from instruct_trl.trainers.engines import check_engine
from instruct_trl.trainers.ppo_ptx_setup import check_whole

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
EXPECTED = {
    "single_cpu": ("NO", {}),
    "single_gpu": ("NO", {}),
    "ddp": ("MULTI_GPU", {}),
    "fsdp2": ("FSDP", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
    "deepspeed_zero2": ("DEEPSPEED", {"zero_stage": 2}),
    "deepspeed_zero3": ("DEEPSPEED", {"zero_stage": 3, "zero3_save_16bit_model": True}),
}


def test_every_launcher_config_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    distributed_type, settings = EXPECTED[name]
    assert getattr(config.distributed_type, "value", config.distributed_type) == distributed_type
    assert config.mixed_precision == "no"  # bf16 is said once, in the recipe's YAML
    assert (config.fsdp_config | config.deepspeed_config).items() >= settings.items()


def test_a_model_in_zero3_shards_is_refused():
    model = torch.nn.Linear(2, 2)
    check_whole(model=model)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="value_model lies in ZeRO-3 shards.*zero3_init_flag: false"):
        check_whole(value_model=model)


def fsdp(**settings):
    """accelerate's plugin, FSDP2 as our YAML sets it but for `settings`."""
    given = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT", **settings}
    return {"fsdp_plugin": FullyShardedDataParallelPlugin(**given)}


def zero(**settings):
    return {"deepspeed_plugin": DeepSpeedPlugin(**settings)}


@pytest.mark.parametrize(
    ("plugins", "says"),
    [
        (fsdp(fsdp_version=1), "Set fsdp_version: 2"),
        (fsdp(cpu_ram_efficient_loading=True), "Set it to false"),
        (fsdp(state_dict_type="SHARDED_STATE_DICT"), "SHARDED_STATE_DICT upstream .* to FULL_STATE_DICT"),
        (zero(zero_stage=0), "Set zero_stage to 2 or 3"),
        (zero(zero_stage=3, zero3_save_16bit_model=False), "without zero3_save_16bit_model"),
        (fsdp(), None),
        (zero(zero_stage=2), None),
        (zero(zero_stage=3, zero3_save_16bit_model=True), None),
        ({}, None),
    ],
)
def test_launcher_settings_that_would_spoil_the_run_are_refused(plugins, says):
    accelerator = SimpleNamespace(state=SimpleNamespace(**{"deepspeed_plugin": None, **plugins}))
    if says is None:
        check_engine(accelerator)
    else:
        with pytest.raises(ValueError, match=says):
            check_engine(accelerator)

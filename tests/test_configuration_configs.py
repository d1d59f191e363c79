"""The two configurations: defaults, round trips, checks, and the size of the feature map."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, BertConfig, LlamaConfig, PhiConfig, ResNetConfig

from sigphi import SiglipResNetConfig, SigPhiConfig
from sigphi.configuration.configuration_siglip_resnet import PHI_2, SiglipResNetVisionConfig, text_config_from
from sigphi.modeling.modeling_siglip_resnet import SiglipResNetVisionModel

CONFIGS = {
    "encoder defaults": lambda: SiglipResNetConfig(),
    "encoder": lambda: SiglipResNetConfig(
        vision_config={"stem": "cifar", "image_size": 32, "depths": [1, 1], "hidden_sizes": [8, 16]},
        text_config=BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        projection_dim=48,
        text_pooling="mean",
        include_text_tower=False,
        text_model_name_or_path="some/tower",
        text_model_revision="v1",
        logit_scale_init_value=1.5,
        logit_bias_init_value=-2.0,
    ),
    "vlm defaults": lambda: SigPhiConfig(),
    "vlm": lambda: SigPhiConfig(
        vision_config={"stem": "cifar", "image_size": 32},
        text_config={"model_type": "llama", "hidden_size": 32, "vocab_size": 99},
        num_image_tokens=16,
        image_token_id=97,
        pad_token_id=98,
        projector_hidden_act="silu",
        lm_head_bias=False,
        tie_word_embeddings=True,
        base_language_model="some/base",
        base_language_model_revision="v2",
        base_bits=4,
        lora={"r": 4, "target_modules": ["q_proj"], "use_rslora": True},
    ),
}


def fields(config):
    """Every field but the place that the config was read from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_equal(tmp_path, name):
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    for reloaded in (type(config).from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(reloaded) is type(config)
        assert fields(reloaded) == fields(config)
        assert type(reloaded.vision_config) is SiglipResNetVisionConfig
        assert type(reloaded.text_config) is type(config.text_config)
    again = type(config).from_dict(config.to_dict())
    assert fields(again) == fields(config)


def test_saving_changes_nothing_but_the_auto_map(tmp_path):
    config = CONFIGS["vlm"]()
    before = config.to_dict()
    config.save_pretrained(tmp_path)
    after = config.to_dict()
    assert after.pop("auto_map") == config.auto_map
    before.pop("auto_map", None)
    assert after == before


def test_configs_do_not_share_their_parts():
    first, second = SigPhiConfig(), SigPhiConfig()
    first.text_config.hidden_size = 7
    first.vision_config.embedding_size = 7
    first.text_config.rope_parameters["rope_theta"] = 7.0
    assert second.text_config.hidden_size == 2560
    assert second.vision_config.embedding_size == 64
    assert second.text_config.rope_parameters["rope_theta"] == PHI_2["rope_parameters"]["rope_theta"] == 10000.0


def test_model_types_are_part_of_the_published_format():
    assert SiglipResNetConfig.model_type == "siglip_resnet"
    assert SigPhiConfig.model_type == "sigphi"
    assert SiglipResNetVisionConfig.model_type == "siglip_resnet_vision"


def test_the_default_image_tower_is_resnet_50():
    vision = SiglipResNetConfig().vision_config
    assert (list(vision.depths), list(vision.hidden_sizes)) == ([3, 4, 6, 3], [256, 512, 1024, 2048])
    assert (vision.embedding_size, vision.layer_type, vision.stem) == (64, "bottleneck", "imagenet")
    assert (vision.image_size, vision.projection_dim, vision.grid_size) == (224, 512, 7)
    # The field by which microsoft/resnet-50 differs from ResNetConfig's class defaults, and its original.
    assert vision.downsample_in_first_stage is ResNetConfig().downsample_in_first_stage is False


def test_the_default_text_model_is_phi_2():
    for config in (SiglipResNetConfig(), SigPhiConfig()):
        text = config.text_config
        assert type(text) is PhiConfig
        assert {name: getattr(text, name) for name in PHI_2} == PHI_2


def test_the_paper_s_initial_values_are_the_defaults():
    config = SiglipResNetConfig()
    assert config.logit_scale_init_value == math.log(10)
    assert config.logit_bias_init_value == -10.0


def test_a_text_config_may_be_an_object_a_dict_or_nothing():
    llama = text_config_from(LlamaConfig(hidden_size=32))
    assert (type(llama), llama.hidden_size) == (LlamaConfig, 32)
    assert type(text_config_from({"model_type": "bert", "hidden_size": 24})) is BertConfig
    assert text_config_from({"model_type": "bert", "hidden_size": 24}).hidden_size == 24
    assert type(text_config_from({"hidden_size": 24})) is PhiConfig
    fields = {"model_type": "llama"}
    text_config_from(fields)
    assert fields == {"model_type": "llama"}


def test_the_image_tower_projects_to_the_encoder_s_size():
    config = SiglipResNetConfig(vision_config={"image_size": 64}, projection_dim=48)
    assert config.vision_config.projection_dim == 48


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SiglipResNetVisionConfig(stem="vit"), "`stem` must be 'imagenet' or 'cifar', got 'vit'"),
        (lambda: SiglipResNetVisionConfig(downsampling="x"), "`downsampling` must be 'stride' or 'pool', got 'x'"),
        (lambda: SiglipResNetConfig(text_pooling="max"), "`text_pooling` must be 'last' or 'mean', got 'max'"),
        (
            lambda: SiglipResNetConfig(vision_config={"projection_dim": 3}, projection_dim=4),
            r"`projection_dim` is 4, but `vision_config\.projection_dim` is 3; give both the same value",
        ),
        (lambda: SigPhiConfig(num_image_tokens=0), r"`num_image_tokens` must be 1 or a square .* got 0"),
        (lambda: SigPhiConfig(num_image_tokens=-4), r"`num_image_tokens` must be 1 or a square .* got -4"),
        (lambda: SigPhiConfig(num_image_tokens=5), r"`num_image_tokens` must be 1 or a square .* got 5"),
        (
            lambda: SigPhiConfig(num_image_tokens=64),
            r"`num_image_tokens` is 64, but the image tower's last feature map has 7 x 7 cells; give at most 49",
        ),
        (lambda: SigPhiConfig(base_bits=5), "`base_bits` must be 4, 8 or 16, got 5"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SiglipResNetVisionConfig(image_size="32"), "image_size"),
        (lambda: SiglipResNetConfig(projection_dim=1.5), "projection_dim"),
        (lambda: SigPhiConfig(lora="r=4"), "lora"),
    ],
)
def test_errors_name_the_field_of_a_wrong_type(make, field):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"Validation error for field '{field}'"):
        make()


def test_initial_values_may_be_whole_numbers():
    assert SiglipResNetConfig(logit_scale_init_value=2, logit_bias_init_value=-10).logit_bias_init_value == -10


def test_a_config_that_became_wrong_is_not_saved(tmp_path):
    config = SigPhiConfig()
    config.num_image_tokens = 7
    with pytest.raises(StrictDataclassClassValidationError, match="`num_image_tokens` must be 1 or a square"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("depths", [[1], [1, 1], [1, 2, 1]])
@pytest.mark.parametrize("image_size", [17, 32, 45])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("downsampling", ["stride", "pool"])
def test_grid_size_is_that_of_the_last_feature_map(downsampling, layer_type, stem, image_size, depths, downsample):
    config = SiglipResNetVisionConfig(
        embedding_size=4,
        hidden_sizes=[8] * len(depths),
        depths=depths,
        layer_type=layer_type,
        stem=stem,
        image_size=image_size,
        projection_dim=4,
        downsample_in_first_stage=downsample,
        downsampling=downsampling,
    )
    # On the meta device, where only sizes are computed.
    with torch.device("meta"):
        output = SiglipResNetVisionModel(config).eval()(torch.empty(1, 3, image_size, image_size))
    assert output.last_hidden_state.shape == (1, 8, config.grid_size, config.grid_size)

"""Small detectors of every transformers family, with seeded random weights: no download, no exact ties.

``FAMILIES`` take images, ``SEGMENTATION_FAMILIES`` give masks too; ``TEXT_FAMILIES`` take a prompt as well
(:func:`prompt`).
"""

from __future__ import annotations

import torch
from torch import nn

SIDE = 64


def _resnet():
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _rt_detr_backbone():
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _rt_detr_like(prefix, backbone, **more):
    import transformers

    config = getattr(transformers, f"{prefix}Config")(
        backbone_config=backbone,
        encoder_in_channels=[16, 24, 32],
        encoder_hidden_dim=32,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_queries=20,
        num_labels=7,
        **more,
    )
    return getattr(transformers, f"{prefix}ForObjectDetection")(config)


def _hgnet():
    from transformers import HGNetV2Config

    return HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 8, 8],
        hidden_sizes=[16, 16, 24, 32],
        depths=[1, 1, 1, 1],
        stage_in_channels=[8, 16, 16, 24],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, False, False],
        stage_kernel_size=[3, 3, 3, 3],
        out_features=["stage2", "stage3", "stage4"],
    )


def _detr_like(prefix, **more):
    import transformers

    config = getattr(transformers, f"{prefix}Config")(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=_resnet(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=20,
        num_labels=7,
        **more,
    )
    return getattr(transformers, f"{prefix}ForObjectDetection")(config)


def _yolos():
    from transformers import YolosConfig, YolosForObjectDetection

    return YolosForObjectDetection(
        YolosConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=[SIDE, SIDE],
            num_detection_tokens=20,
            num_labels=7,
        )
    )


def _lw_detr():
    from transformers import LwDetrConfig, LwDetrForObjectDetection, LwDetrViTConfig

    backbone = LwDetrViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        pretrain_image_size=SIDE,
        patch_size=8,
        window_block_indices=[0, 2],
        num_windows=4,
        out_indices=[1, 3],
    )
    config = LwDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_layers=2,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        decoder_ffn_dim=64,
        num_queries=20,
        projector_scale_factors=[1.0],
        group_detr=1,
        num_labels=7,
    )
    return LwDetrForObjectDetection(config)


def _rf_detr():
    from transformers import RfDetrConfig, RfDetrForObjectDetection

    backbone = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        "num_windows": 2,
        "window_block_indices": [0, 2],
        "out_indices": [2, 4],
        "model_type": "rf_detr_dinov2",
    }
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_layers=2,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        decoder_ffn_dim=64,
        num_queries=20,
        group_detr=1,
        num_labels=7,
    )
    return RfDetrForObjectDetection(config)


def _owl(prefix):
    import transformers

    config = getattr(transformers, f"{prefix}Config")(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 50,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 16,
        },
        projection_dim=32,
    )
    return getattr(transformers, f"{prefix}ForObjectDetection")(config)


def _grounding_dino(prefix):
    import transformers

    config = getattr(transformers, f"{prefix}Config")(
        backbone_config=transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 4],
            window_size=2,
            image_size=SIDE,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=1200
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=20,
        max_text_len=16,
    )
    return getattr(transformers, f"{prefix}ForObjectDetection")(config)


TEXT_FAMILIES = {
    "owlvit": lambda: _owl("OwlViT"),
    "owlv2": lambda: _owl("Owlv2"),
    "grounding_dino": lambda: _grounding_dino("GroundingDino"),
    "mm_grounding_dino": lambda: _grounding_dino("MMGroundingDino"),
}

FAMILIES = {
    "rt_detr": lambda: _rt_detr_like("RTDetr", _rt_detr_backbone()),
    "rt_detr_v2": lambda: _rt_detr_like("RTDetrV2", _rt_detr_backbone()),
    "d_fine": lambda: _rt_detr_like("DFine", _hgnet(), feat_strides=[8, 16, 32]),
    "deimv2": lambda: _rt_detr_like("Deimv2", _hgnet(), feat_strides=[8, 16, 32], lqe_hidden_dim=8),
    "deformable_detr": lambda: _detr_like("DeformableDetr", num_feature_levels=3),
    "conditional_detr": lambda: _detr_like("ConditionalDetr"),
    "dab_detr": lambda: _dab_detr(),
    "detr": lambda: _detr_like("Detr"),
    "table_transformer": lambda: _detr_like("TableTransformer"),
    "yolos": _yolos,
    "lw_detr": _lw_detr,
    "rf_detr": _rf_detr,
}


def _dab_detr():
    from transformers import DabDetrConfig, DabDetrForObjectDetection

    return DabDetrForObjectDetection(
        DabDetrConfig(
            use_timm_backbone=False,
            backbone=None,
            backbone_config=_resnet(),
            hidden_size=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=20,
            num_labels=7,
        )
    )


def detector(family: str) -> nn.Module:
    """Build one in evaluation mode, its weights spread out: as made, many families score all queries the same."""
    torch.manual_seed(0)
    model = (FAMILIES | TEXT_FAMILIES | SEGMENTATION_FAMILIES)[family]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def prompt(family: str, batch: int) -> dict[str, torch.Tensor]:
    """What a text-conditioned detector takes beside images: three phrases."""
    if family.startswith("owl"):  # one row for each phrase of each image
        phrases = torch.tensor([[48, 1, 49], [48, 7, 49], [48, 9, 49]]).repeat(batch, 1)
        return {"input_ids": phrases, "attention_mask": torch.ones_like(phrases)}
    # One row for each image: [CLS] phrase . phrase . phrase . [SEP], in BERT's ids.
    row = torch.tensor([[101, 7, 8, 1012, 9, 1012, 11, 12, 1012, 102]]).repeat(batch, 1)
    return {"input_ids": row, "attention_mask": torch.ones_like(row), "token_type_ids": torch.zeros_like(row)}


def _segmentation(name):
    import transformers

    # Its mask head wants the width and the heads together to be a multiple of 8.
    config = _detr_like(name).config
    config.update({"encoder_attention_heads": 8, "decoder_attention_heads": 8})
    return getattr(transformers, f"{name}ForSegmentation")(config)


def _rf_detr_with_masks():
    from transformers import RfDetrForInstanceSegmentation

    return RfDetrForInstanceSegmentation(_rf_detr().config)


SEGMENTATION_FAMILIES = {
    "detr_segmentation": lambda: _segmentation("Detr"),
    "conditional_detr_segmentation": lambda: _segmentation("ConditionalDetr"),
    "rf_detr_segmentation": _rf_detr_with_masks,
}

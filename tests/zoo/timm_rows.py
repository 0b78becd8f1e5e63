"""timm's architectures: at least one of every module that registers any, small ones and well-known ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.torchvision_stub import import_torchvision
from tests.zoo.rows import Row

SIDE = 96  # pixels: three positions are left after five strides of two
SIDES = {
    "bat_resnext26ts": 256,  # whole blocks of positions, in every stage
    "eca_halonext26ts": 256,
    "halo2botnet50ts_256": 128,
    "lamhalobotnet50ts_256": 128,
    "efficientformer_l1": 224,  # a table for this number of positions
    "deepseek_vit_412m": 112,  # patches of 14
    "vit_small_patch14_reg4_dinov2": 98,
    "vgg11": 64,  # its first linear layer is a convolution over 7 x 7 positions, to which fewer are stretched
    "swin_tiny_patch4_window7_224": 224,  # as it is published: nothing has to be filled up to whole windows
    "vit_base_patch16_224": 224,
}

# Of these, four blocks stand for as many as would take a gigabyte and several seconds.
SHALLOW = {"aimv2_large_patch14_224": 4, "deepseek_vit_412m": 4, "gemma4_vit_167m": 4}

# They run on images of any size.
FREE = """
    mobileone_s0 gernet_s repvgg_a0 regnetz_b16 regnetz_b16_evos regnetz_d8 gcresnext26ts bat_resnext26ts
    resnet51q resnet50_mlp resnet50_clip_gap test_byobnet
    eca_halonext26ts lambda_resnet26t
    convmixer_1024_20_ks9_p14
    convnext_zepto_rms convnext_atto_ols convnext_tiny convnextv2_atto test_convnext test_convnext2
    cpubone_nano cpubone_b1_dwnorm
    crossvit_tiny_240 crossvit_9_dagger_240
    csatv2
    cs3darknet_focus_s cs3darknet_s cs3sedarknet_xdw cspdarknet53 cspresnext50 darknet17 darknetaa53
    cspnext_tiny
    davit_tiny
    deepseek_vit_412m
    densenet121 densenetblur121d
    dla34 dla46x_c dla60_res2net dla60_res2next
    dpn48b dpn68b
    edgenext_xx_small edgenext_small_rw
    efficientformer_l1
    mobilenetv1_100 mobilenetv2_050 mobilenetv2_100 mnasnet_small semnasnet_075 tinynet_e mixnet_s tf_mixnet_s
    mobilenet_edgetpu_v2_xs spnasnet_100 fbnetc_100 efficientnet_lite0 efficientnet_b0 tf_efficientnet_b0
    efficientnet_b0_gn efficientnet_b0_g8_gn efficientnet_b0_g16_evos efficientnet_blur_b0 efficientnet_es
    efficientnet_b1_pruned efficientnet_cc_b0_4e tf_efficientnetv2_b0 efficientnetv2_s gc_efficientnetv2_rw_t
    efficientnet_x_b3 efficientnet_h_b5 test_efficientnet_ln
    efficientvim_m1 efficientvim_m1_dist
    efficientvit_b0 efficientvit_l1
    efficientvit_m0 efficientvit_m1
    vit_tiny_patch16_dinov3_qkvb vit_small_plus_patch16_dinov3 vit_small_patch16_lingbot
    fasternet_t0
    fastvit_t8 fastvit_sa12 fastvit_mci0
    focalnet_tiny_srf focalnet_tiny_lrf
    gemma4_vit_167m
    ghostnet_050 ghostnet_100 ghostnetv2_100 ghostnetv3_050
    hardcorenas_a
    hgnet_tiny hgnetv2_b0 hgnetv2_b4
    sam2_hiera_tiny hieradet_small
    hrnet_w18_small hrnet_w18_ssld
    iformer_t iformer_m_distilled
    inception_next_atto inception_next_tiny
    inception_resnet_v2
    inception_v3
    inception_v4
    lcnetv2_small
    lowformer_b0 lowformer_e1
    mambaout_femto test_mambaout
    poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
    mobilenetv3_small_100 mobilenetv3_large_100 tf_mobilenetv3_small_minimal_100 lcnet_050 fbnetv3_b
    mobilenetv4_conv_small mobilenetv4_conv_aa_medium mobilenetv4_hybrid_medium
    mobilenetv5_base
    mobilevit_xxs mobilevit_s mobilevitv2_050
    mvitv2_tiny mvitv2_small_cls
    naflexvit_base_patch16_gap naflexvit_base_patch16_map
    nasnetalarge
    nextvit_small
    nf_regnet_b0 nf_resnet26 nf_ecaresnet26 eca_nfnet_l0 dm_nfnet_f0 test_nfnet
    pnasnet5large
    pvt_v2_b0 pvt_v2_b2_li
    qwen3_vit_88m qwen3_vit_88m_merge
    rdnet_tiny
    regnetx_002 regnety_002 regnetz_005 regnetv_040 regnety_040_sgn
    repghostnet_050
    repvit_m0_9 repvit_m1
    res2net50_14w_8s res2next50
    resnest14d resnest50d_1s4x24d resnest50d_4s2x40d
    resnet10t resnet18 resnet18d resnet26t resnet50 resnet50_gn resnet50d resnet101 resnetaa50 resnetblur18 ecaresnet26t
    ecaresnet50d_pruned ecaresnetlight seresnet18 seresnext26t_32x4d resnetrs50 resnext50_32x4d wide_resnet50_2
    resnetv2_18 resnetv2_50 resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
    rexnet_100 rexnetr_100
    selecsls42
    legacy_seresnet18 legacy_seresnext26_32x4d
    sequencer2d_s
    shvit_s1
    skresnet18 skresnext50_32x4d
    starnet_s050 starnet_s1
    swiftformer_xs
    tiny_vit_5m_224
    tresnet_m tresnet_v2_l
    twins_svt_small twins_pcpvt_small
    vgg11
    ese_vovnet19b_slim_dw eca_vovnet39b ese_vovnet39b_evos vovnet39a
    legacy_xception
    xception41 xception41p
    xcit_nano_12_p16_224 xcit_tiny_12_p16_224
"""

# They are made for images of one size.
SIZED = """
    beit_base_patch16_224 beitv2_base_patch16_224
    botnet26t_256 eca_botnext26ts_256 lambda_resnet26rpt_256 sebotnet33ts_256 halo2botnet50ts_256 lamhalobotnet50ts_256
    cait_xxs24_224
    coat_tiny coat_lite_tiny
    convit_tiny
    deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
    efficientformerv2_s0
    eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384 vit_small_patch16_rope_224 vit_small_patch16_rope_mixed_ape_224
    gcvit_xxtiny
    hiera_tiny_224 hiera_small_abswin_256
    levit_128s levit_conv_128s levit_256d
    maxvit_rmlp_pico_rw_256 maxvit_tiny_tf_224 maxvit_tiny_pm_256 coatnet_pico_rw_224 coatnet_nano_cc_224
    coatnet_0_224 coatnext_nano_rw_224 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 test_maxvit test_coatnet
    gmlp_ti16_224 gmixer_12_224 resmlp_12_224 mixer_s16_224
    nest_tiny nest_tiny_jx
    pit_ti_224 pit_ti_distilled_224
    swin_tiny_patch4_window7_224 swin_s3_tiny_224
    swinv2_tiny_window8_256
    swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224
    tnt_s_patch16_224 tnt_s_legacy_patch16_224
    visformer_tiny
    vit_tiny_patch16_224 vit_base_patch16_224 vit_wee_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256
    vit_small_patch14_reg4_dinov2 vit_xsmall_patch16_clip_224 vit_base_patch16_siglip_224 vit_base_patch16_rpn_224
    vit_small_patch16_18x2_224 beit3_base_patch16_224 aimv2_large_patch14_224 flexivit_small test_vit3
    vit_tiny_r_s16_p8_224 vit_small_r26_s32_224 vit_base_mci_224
    vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 vit_relpos_medium_patch16_cls_224
    vit_relpos_small_patch16_rpn_224 test_vit_relpos
    samvit_base_patch16_224
    vitamin_small_224
    volo_d1_224
"""

SAMPLE = """
    vit_tiny_patch16_224 eva02_tiny_patch14_224 test_vit_relpos cait_xxs24_224 levit_128s botnet26t_256 lambda_resnet26t
    convnextv2_atto test_maxvit test_nfnet ghostnet_050 skresnet18 resnest14d dla60_res2next xcit_nano_12_p16_224
    efficientvit_m0 mobilevit_xxs mixnet_s gmlp_ti16_224 sequencer2d_s crossvit_tiny_240 efficientvim_m1 shvit_s1
    starnet_s050
"""


def rows() -> list[Row]:
    """Every architecture named above; its family is the module of timm that registers it."""
    timm = import_timm()
    sample = SAMPLE.split()
    made = []
    for names, sized in (FREE, False), (SIZED, True):
        for name in names.split():
            side = SIDES.get(name, SIDE)
            arguments: dict[str, Any] = {"img_size": side} if sized else {}
            if name in SHALLOW:
                arguments["depth"] = SHALLOW[name]
            family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
            model, inputs = partial(build, name, arguments), partial(images, side)
            made.append(Row(f"timm/{name}", "timm", family, model, inputs, name in sample))
    return made


def import_timm() -> Any:
    """timm, which needs torchvision; skips the test or the test file where either is not installed."""
    import_torchvision()
    return pytest.importorskip("timm", reason="timm is not installed (pip install --no-deps -c constraints.txt timm)")


def build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Make the network with random weights."""
    return import_timm().create_model(name, pretrained=False, **arguments)


def images(side: int) -> Tensor:
    """Two images."""
    return torch.randn(2, 3, side, side)

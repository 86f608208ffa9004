"""The architectures of the coverage table: sources and the pixels of a side, small where the network allows it."""

PYTORCHCV = {
    "resnet20_cifar10": "pytorchcv.models.resnet_cifar",
    "preresnet20_cifar10": "pytorchcv.models.preresnet_cifar",
    "densenet40_k12_cifar10": "pytorchcv.models.densenet_cifar",
    "nin_cifar10": "pytorchcv.models.nin_cifar",
    "resnext20_16x4d_cifar10": "pytorchcv.models.resnext_cifar",
    "seresnet20_cifar10": "pytorchcv.models.seresnet_cifar",
    "sepreresnet20_cifar10": "pytorchcv.models.sepreresnet_cifar",
    "pyramidnet110_a48_cifar10": "pytorchcv.models.pyramidnet_cifar",
    "wrn16_10_cifar10": "pytorchcv.models.wrn_cifar",
    "fractalnet_cifar10": "pytorchcv.models.fractalnet_cifar",
    "diaresnet20_cifar10": "pytorchcv.models.diaresnet_cifar",
    "shakeshakeresnet20_2x16d_cifar10": "pytorchcv.models.shakeshakeresnet_cifar",
    "ror3_56_cifar10": "pytorchcv.models.ror_cifar",
    "rir_cifar10": "pytorchcv.models.rir_cifar",
    "msdnet22_cifar10": "pytorchcv.models.msdnet_cifar10",
    "xdensenet40_2_k24_bc_cifar10": "pytorchcv.models.xdensenet_cifar",
    "bam_resnet18": "pytorchcv.models.bamresnet",
    "cbam_resnet18": "pytorchcv.models.cbamresnet",
    "bninception": "pytorchcv.models.bninception",
    "darknet_ref": "pytorchcv.models.darknet",
    "diracnet18v2": "pytorchcv.models.diracnetv2",
    "drnc26": "pytorchcv.models.drn",
    "fdmobilenet_w1": "pytorchcv.models.fdmobilenet",
    "hardnet39ds": "pytorchcv.models.hardnet",
    "ibn_resnet50": "pytorchcv.models.ibnresnet",
    "menet108_8x1_g3": "pytorchcv.models.menet",
    "mobilenetb_w1": "pytorchcv.models.mobilenetb",
    "octresnet10_ad2": "pytorchcv.models.octresnet",
    "peleenet": "pytorchcv.models.peleenet",
    "proxylessnas_cpu": "pytorchcv.models.proxylessnas",
    "resneta10": "pytorchcv.models.resneta",
    "revnet38": "pytorchcv.models.revnet",
    "sharesnet18": "pytorchcv.models.sharesnet",
    "shufflenet_g1_w1": "pytorchcv.models.shufflenet",
    "shufflenetv2_wd2": "pytorchcv.models.shufflenetv2",
    "sqnxt23_w1": "pytorchcv.models.squeezenext",
    "vovnet27s": "pytorchcv.models.vovnet",
}
"""Module of each of pytorchcv's functions."""

_PIXELS: dict[int, str] = {
    32: """
        pytorchcv:resnet20_cifar10 pytorchcv:preresnet20_cifar10 pytorchcv:densenet40_k12_cifar10
        pytorchcv:nin_cifar10 pytorchcv:resnext20_16x4d_cifar10 pytorchcv:seresnet20_cifar10
        pytorchcv:sepreresnet20_cifar10 pytorchcv:pyramidnet110_a48_cifar10 pytorchcv:wrn16_10_cifar10
        pytorchcv:fractalnet_cifar10 pytorchcv:diaresnet20_cifar10 pytorchcv:shakeshakeresnet20_2x16d_cifar10
        pytorchcv:ror3_56_cifar10 pytorchcv:rir_cifar10 pytorchcv:msdnet22_cifar10
        pytorchcv:xdensenet40_2_k24_bc_cifar10
    """,
    64: """
        torchvision:alexnet torchvision:vgg11_bn torchvision:vgg11 torchvision:resnet18 torchvision:resnet50
        torchvision:resnext50_32x4d torchvision:wide_resnet50_2 torchvision:densenet121 torchvision:googlenet
        torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:mobilenet_v3_large
        torchvision:mnasnet0_5 torchvision:squeezenet1_1 torchvision:shufflenet_v2_x0_5 torchvision:regnet_y_400mf
        torchvision:regnet_x_400mf torchvision:efficientnet_b0 torchvision:efficientnet_v2_s
        torchvision:convnext_tiny timm:resnet18 timm:resnet26d timm:resnetblur50 timm:ecaresnet26t timm:seresnet18
        timm:skresnet18 timm:resnest14d timm:res2net50_14w_8s timm:res2next50 timm:legacy_seresnet18
        timm:resnetv2_18 timm:resnetv2_50 timm:resnetv2_50x1_bit timm:nf_resnet26 timm:densenetblur121d timm:dla34
        timm:dla46x_c timm:dpn48b timm:efficientnet_lite0 timm:tf_efficientnet_b0 timm:efficientnet_es
        timm:mixnet_s timm:tf_mixnet_s timm:mnasnet_small timm:fbnetc_100 timm:spnasnet_100 timm:mobilenetv2_050
        timm:mobilenetv1_100 timm:mobilenetv3_small_050 timm:tf_mobilenetv3_small_minimal_100
        timm:mobilenetv4_conv_small timm:hardcorenas_a timm:lcnet_050 timm:tinynet_e timm:ghostnet_050
        timm:ghostnetv2_100 timm:repghostnet_050 timm:repvgg_a0 timm:mobileone_s0 timm:repvit_m0_9 timm:fastvit_t8
        timm:regnetx_002 timm:regnety_002 timm:regnetz_005 timm:rexnet_100 timm:hrnet_w18_small timm:hgnetv2_b0
        timm:xception41 timm:selecsls42 timm:cspresnet50 timm:cs3darknet_s timm:darknet53 timm:vovnet39a
        timm:ese_vovnet19b_dw timm:gernet_s timm:gcresnext26ts timm:eca_resnext26ts
        timm:tresnet_m timm:convmixer_768_32 timm:starnet_s1 timm:fasternet_t0 timm:inception_next_atto
        timm:convnextv2_atto timm:mambaout_femto timm:edgenext_xx_small timm:mobilevit_xxs timm:mobilevitv2_050
        timm:efficientvit_b0 timm:pvt_v2_b0 timm:cspnext_tiny timm:lcnetv2_small timm:shvit_s1
        timm:convnext_atto timm:poolformer_s12 timm:poolformerv2_s12 timm:convformer_s18 timm:caformer_s18
        timm:eca_nfnet_l0 timm:fastvit_sa12 timm:fastvit_mci0 timm:tiny_vit_5m_224 timm:davit_tiny
        timm:focalnet_tiny_srf timm:nextvit_small timm:rdnet_tiny timm:iformer_t timm:efficientvim_m1
        timm:lowformer_b0
        timm:test_efficientnet timm:test_resnet timm:test_byobnet timm:test_nfnet
    """,
    96: """
        torchvision:inception_v3 timm:inception_v4 timm:inception_resnet_v2 timm:legacy_xception timm:nasnetalarge
        timm:pnasnet5large
    """,
    224: """
        timm:levit_128s timm:efficientformer_l1 timm:efficientvit_m0 timm:visformer_tiny timm:swiftformer_xs
        pytorchcv:bam_resnet18 pytorchcv:cbam_resnet18
        pytorchcv:bninception pytorchcv:darknet_ref pytorchcv:diracnet18v2 pytorchcv:drnc26
        pytorchcv:fdmobilenet_w1 pytorchcv:hardnet39ds pytorchcv:ibn_resnet50 pytorchcv:menet108_8x1_g3
        pytorchcv:mobilenetb_w1 pytorchcv:octresnet10_ad2 pytorchcv:peleenet pytorchcv:proxylessnas_cpu
        pytorchcv:resneta10 pytorchcv:revnet38 pytorchcv:sharesnet18 pytorchcv:shufflenet_g1_w1
        pytorchcv:shufflenetv2_wd2 pytorchcv:sqnxt23_w1 pytorchcv:vovnet27s
    """,
    256: """
        timm:halonet26t timm:botnet26t_256 timm:bat_resnext26ts
    """,
}
_CHOSEN_PIXELS: dict[int, str] = {
    56: "timm:eva02_tiny_patch14_224",
    64: """
        timm:vit_tiny_patch16_224 timm:deit_tiny_patch16_224 timm:deit3_small_patch16_224 timm:beit_base_patch16_224
        timm:swin_tiny_patch4_window7_224 timm:swinv2_tiny_window8_256 timm:swinv2_cr_tiny_224 timm:cait_xxs24_224
        timm:xcit_nano_12_p16_224 timm:twins_pcpvt_small timm:twins_svt_small timm:coat_lite_tiny timm:mixer_s32_224
        timm:resmlp_12_224 timm:gmlp_ti16_224 timm:gmixer_12_224 timm:repvit_m1 timm:coatnet_nano_rw_224
        timm:coatnext_nano_rw_224 timm:maxvit_pico_rw_256 timm:maxvit_tiny_tf_224 timm:vit_pwee_patch16_reg1_gap_256
        timm:vit_tiny_r_s16_p8_224 timm:vit_relpos_small_patch16_224 timm:flexivit_small
        timm:vit_small_patch16_rope_224 timm:pit_ti_224 timm:hiera_tiny_224 timm:mvitv2_tiny timm:nest_tiny
        timm:sequencer2d_s timm:tnt_s_patch16_224 timm:volo_d1_224 timm:vitamin_small_224 timm:samvit_base_patch16
    """,
    224: "timm:efficientformerv2_s0 timm:convit_tiny timm:gcvit_xxtiny",
    240: "timm:crossvit_9_240",
}
"""Those that are built for images of one size, which is chosen here."""

SIZED = {source.removeprefix("timm:") for sources in _CHOSEN_PIXELS.values() for source in sources.split()}
ARCHITECTURES = {
    source: pixels
    for groups in (_PIXELS, _CHOSEN_PIXELS)
    for pixels, sources in groups.items()
    for source in sources.split()
}

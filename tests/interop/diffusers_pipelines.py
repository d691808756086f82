"""Tiny pipelines of diffusers with random weights: one function for each transformer class, by its name."""

import importlib
from types import SimpleNamespace

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

diffusers.WanTransformer3DModel._keep_in_fp32_modules = None  # diffusers needs accelerate for it; all is float32 here

WORDS = ("a", "red", "cat", "blue", "dog", "on", "the", "mat", "in", "big")


@torch.no_grad()
def randomise(module, std=0.1, seed=0):
    """Every weight is a normal number: zeros of a new network would hide errors. Norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(noise + (parameter.ndim == 1) * parameter)
    return module.eval()


def tokenizer(length=16, form="<s> $A </s>", letters=False):
    """Words, or letters, by number; with a start token of a prompt and an end token, or in another form."""
    vocabulary = {name: number for number, name in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    if letters:
        vocabulary = {name: number for number, name in enumerate(("<pad>", "<s>", "</s>", "<unk>", *"adegoclru "))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated") if letters else pre_tokenizers.WhitespaceSplit()
    if form:
        words.post_processor = processors.TemplateProcessing(
            single=form, pair=f"{form} $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **names)


VOCABULARY = 4 + len(WORDS)


def t5(width=32, kind="T5", seed=1):
    settings = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = getattr(transformers, f"{kind}Config")(**settings, feed_forward_proj="gated-gelu")
    return randomise(getattr(transformers, f"{kind}EncoderModel")(config), 0.3, seed)


def clip(width=32, kind="CLIPTextModel", seed=2, **more):
    settings = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 1}
    return randomise(getattr(transformers, kind)(transformers.CLIPTextConfig(**settings, **more)), 0.3, seed)


def decoder(kind, width=32, seed=3, **more):
    """A language model: Gemma2Model, LlamaModel, ..."""
    settings = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    config = getattr(transformers, kind.replace("Model", "Config").replace("ForCausalLM", "Config"))
    return randomise(getattr(transformers, kind)(config(**settings, pad_token_id=0, **more)), 0.2, seed)


def kl(channels, scale=0.7, shift=None, levels=2, **more):
    settings = {
        "block_out_channels": (8,) * levels,
        "latent_channels": channels,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * levels}
    vae = diffusers.AutoencoderKL(**settings, **blocks, scaling_factor=scale, shift_factor=shift, **more)
    return randomise(vae, 0.2, 4)


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=40, caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=12,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(4, 1.5, 0.06),
        text_encoder=clip(16, "CLIPTextModelWithProjection", projection_dim=16),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(24, "CLIPTextModelWithProjection", 5, projection_dim=24, hidden_act="gelu"),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(40),
        tokenizer_3=tokenizer(32),
    )


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=kl(4, 0.36, 0.11),
        text_encoder=clip(24),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(32),
    )


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4, sample_size=8,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomise(vae, 0.2),
        text_encoder=decoder("Gemma2Model"),
        tokenizer=tokenizer(64, "<s> $A"),
    )


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(128, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl(4, 0.36, 0.11),
        text_encoder=decoder("Gemma2Model"),
        tokenizer=tokenizer(64),
    )


def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=kl(4),
        text_encoder=t5(kind="UMT5"),
        tokenizer=tokenizer(32),
    )


def hunyuan():
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        hidden_size=16, cross_attention_dim=32, cross_attention_dim_t5=24, pooled_projection_dim=16, text_len=77,
        text_len_t5=256,
    )  # fmt: skip
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": 77}
    bert = randomise(transformers.BertModel(transformers.BertConfig(**settings)), 0.3)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.03, "steps_offset": 1}
    return diffusers.HunyuanDiTPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False),
        vae=kl(4, levels=4),
        text_encoder=bert,
        tokenizer=tokenizer(77),
        text_encoder_2=t5(24),
        tokenizer_2=tokenizer(256),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=kl(4, 0.36, 0.11),
        text_encoder=t5(),
        tokenizer=tokenizer(32),
    )


def prx():
    cleaning = importlib.import_module("diffusers.pipelines.prx.pipeline_prx")
    cleaning.ftfy = SimpleNamespace(fix_text=lambda text: text)  # not installed; these prompts need no repair
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=4, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    return diffusers.PRXPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(4, 0.36, 0.11),
        text_encoder=t5(),
        tokenizer=tokenizer(16),
    )


def qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.8],
    )  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "rope_scaling": {"type": "mrope"}, "pad_token_id": 0}
    text["rope_scaling"]["mrope_section"] = [2, 3, 3]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return diffusers.QwenImagePipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=randomise(vae, 0.2),
        text_encoder=randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), 0.2),
        tokenizer=tokenizer(1024, form=None, letters=True),
    )


def cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        max_text_seq_length=226, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    vae = diffusers.AutoencoderKLCogVideoX(
        **blocks, block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        scaling_factor=0.7, sample_height=64, sample_width=64,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    return diffusers.CogVideoXPipeline(
        transformer=randomise(transformer), scheduler=scheduler, vae=randomise(vae, 0.2), text_encoder=t5(),
        tokenizer=tokenizer(226),
    )  # fmt: skip


def latte():
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=32, video_length=3, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return diffusers.LattePipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False),
        vae=kl(4),
        text_encoder=t5(),
        tokenizer=tokenizer(120),
    )


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    vae = randomise(vae, 0.2)
    generator = torch.Generator().manual_seed(1)
    vae.latents_mean.copy_(torch.randn(8, generator=generator) * 0.2)
    vae.latents_std.copy_(torch.rand(8, generator=generator) + 0.5)
    return diffusers.LTXPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(128),
    )


def wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=wan_vae(),
        text_encoder=t5(kind="UMT5"),
        tokenizer=tokenizer(512),
    )


def wan_vae():
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.8],
    )  # fmt: skip
    return randomise(vae, 0.2)


def sana_video():
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=32,
    )  # fmt: skip
    return diffusers.SanaVideoPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=wan_vae(),
        text_encoder=decoder("Gemma2Model"),
        tokenizer=tokenizer(64, "<s> $A"),
    )


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=32, pooled_projection_dim=24,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=True,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=randomise(vae, 0.2),
        text_encoder=decoder("LlamaModel"),
        tokenizer=tokenizer(1024, letters=True),
        text_encoder_2=clip(24),
        tokenizer_2=tokenizer(77),
    )


def pixart():
    """Our own network; not one of the classes of diffusers."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, cross_attention_dim=32,
        caption_channels=32,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=kl(4),
        text_encoder=t5(),
        tokenizer=tokenizer(120),
    )


PIPELINES = {
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "SanaTransformer2DModel": sana,
    "Lumina2Transformer2DModel": lumina2,
    "AuraFlowTransformer2DModel": auraflow,
    "HunyuanDiT2DModel": hunyuan,
    "ChromaTransformer2DModel": chroma,
    "QwenImageTransformer2DModel": qwen,
    "PRXTransformer2DModel": prx,
    "CogVideoXTransformer3DModel": cogvideox,
    "LatteTransformer3DModel": latte,
    "LTXVideoTransformer3DModel": ltx,
    "WanTransformer3DModel": wan,
    "SanaVideoTransformer3DModel": sana_video,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
}
# Arguments of a pipeline that are not those of all others.
OPTIONS = {
    "FluxTransformer2DModel": {"guidance_scale": 3.5, "true_cfg_scale": 3.0},
    "SanaTransformer2DModel": {"use_resolution_binning": False},
    "Lumina2Transformer2DModel": {"cfg_normalization": False},
    "HunyuanDiT2DModel": {"use_resolution_binning": False},
    "QwenImageTransformer2DModel": {"true_cfg_scale": 1.0},
    "SanaVideoTransformer3DModel": {"use_resolution_binning": False, "frames": 5},
    "HunyuanVideoTransformer3DModel": {"guidance_scale": 6.0, "true_cfg_scale": 3.0},
    "PRXTransformer2DModel": {"use_resolution_binning": False},
    "LatteTransformer3DModel": {"video_length": 3, "clean_caption": False},
}
SIZES = {"FluxTransformer2DModel": (8, 12), "SanaTransformer2DModel": (16, 16)}
SIZES |= {"ChromaTransformer2DModel": (8, 8), "QwenImageTransformer2DModel": (8, 12), "PRXTransformer2DModel": (8, 8)}
SIZES |= {"LTXVideoTransformer3DModel": (2, 8, 8), "WanTransformer3DModel": (2, 4, 6)}
SIZES |= {"SanaVideoTransformer3DModel": (2, 4, 8), "HunyuanVideoTransformer3DModel": (2, 4, 6)}
SIZES |= {"CogVideoXTransformer3DModel": (2, 8, 6)}  # of latents, if not the trained one

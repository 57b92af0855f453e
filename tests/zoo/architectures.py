"""What the zoo holds: names of architectures by kind, and what is particular to single ones.

Sizes are chosen so that a model runs in a hundredth of a second; nothing is downloaded, all weights are random.
"""

KINDS = {
    "causal": """gpt2 llama mistral mixtral qwen3 qwen2_moe qwen3_next gemma2 phi phi3 phimoe opt falcon gpt_neox
        codegen mpt mamba mamba2 falcon_mamba falcon_h1 nemotron nemotron_h olmo2 olmo3 olmoe granitemoe
        stablelm cohere2 dbrx deepseek_v2 glm4 glm4_moe persimmon openai-gpt recurrent_gemma smollm3 exaone4
        llama4_text arcee helium hunyuan_v1_dense minimax bitnet apertus doge dots1 modernbert-decoder jetmoe
        xlstm vaultgemma minicpm3""",
    "encoder": """bert distilbert deberta deberta-v2 albert mpnet xlm camembert rembert squeezebert convbert funnel
        modernbert esm ibert mra nomic_bert eurobert data2vec-text clip_text_model""",
    "seq2seq": "t5 mt5 umt5 bart pegasus blenderbot longt5 m2m_100 plbart",
    "vision": """vit dinov2 dinov2_with_registers dinov3_vit swin convnext regnet pvt mobilevitv2 mobilenet_v1 bit cvt
        focalnet vit_msn siglip_vision_model clip_vision_model yolos data2vec-vision aimv2_vision_model
        imagegpt videomae timesformer vivit""",
    "audio": "whisper speech_to_text audio-spectrogram-transformer wav2vec2 sew data2vec-audio",
    "series": "patchtst patchtsmixer autoformer decision_transformer",
    "timm": """vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224 resnet18 resnet50 seresnet18
        densenet121 dla34 dpn48b efficientnet_b0 mobilenetv2_050 mnasnet_050 regnetx_002 convnext_atto
        convnextv2_atto nfnet_l0 selecsls42b legacy_seresnet18 rexnet_100 cspresnet50 lcnet_050 tinynet_e
        fasternet_t0 repghostnet_050 repvit_m0_9 mambaout_femto mobilevit_xxs mobilevitv2_050
        edgenext_xx_small pvt_v2_b0 focalnet_tiny_srf convmixer_768_32 fastvit_t8 swiftformer_xs
        vit_relpos_small_patch16_224 inception_v4 xception41 gmlp_ti16_224 resmlp_12_224
        swin_tiny_patch4_window7_224 pit_ti_224 levit_128s coat_tiny convit_tiny coatnet_nano_rw_224
        efficientformer_l1 efficientformerv2_s0 gcvit_xxtiny nest_tiny hiera_tiny_224 eva02_tiny_patch14_224
        tiny_vit_5m_224""",
}
NAMES = {kind: tuple(names.split()) for kind, names in KINDS.items()}

# One of every mechanism: what `make test` runs.
QUICK = (
    *(
        "gpt2",
        "llama",
        "gemma2",
        "mixtral",
        "mamba",
        "qwen3_next",
        "openai-gpt",
        "minicpm3",
        "bert",
        "esm",
        "albert",
        "xlm",
    ),
    *("t5", "bart", "swin", "cvt", "yolos", "wav2vec2", "patchtst", "autoformer"),
)

# Size of every field of a configuration that is a whole number by default, by what it measures.
WIDTH, INNER, HEADS, DEPTH = 32, 48, 4, 3
FIELDS = {
    WIDTH: """hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim lru_width
        image_size""",
    INNER: """intermediate_size ffn_dim d_ff n_inner hidden_dim d_inner encoder_ffn_dim decoder_ffn_dim
        ffn_hidden_size shared_intermediate_size""",
    HEADS: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        rotary_dim num_experts num_local_experts n_routed_experts mamba_d_conv linear_num_value_heads""",
    DEPTH: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
        num_blocks num_channels num_feat_extract_layers""",
    16: """moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank qk_head_dim
        sliding_window attention_window_size num_mel_bins num_conv_pos_embeddings""",
    8: """head_dim d_kv kv_channels d_head qk_nope_head_dim qk_rope_head_dim v_head_dim patch_size state_size
        mamba_d_state mamba_d_head mamba_n_heads linear_key_head_dim linear_value_head_dim""",
    2: """num_key_value_heads num_kv_heads num_experts_per_tok linear_num_key_heads mamba_expand
        num_conv_pos_embedding_groups eos_token_id""",
    1: "n_group topk_group first_k_dense_replace mamba_n_groups bos_token_id",
    0: "pad_token_id decoder_start_token_id",
    97: "vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions",
}
SIZES = {field: size for size, fields in FIELDS.items() for field in fields.split()}
OPTIONAL = ("vocab_size", "head_dim", "n_inner", "num_attention_heads", "num_key_value_heads")  # set though None

# What a single architecture needs beside that, as keywords of its configuration (timm: of its constructor).
PARTICULAR = {
    "mamba": dict(expand=2, conv_kernel=4),
    "falcon_mamba": dict(expand=2, conv_kernel=4),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8, conv_kernel=4),
    "falcon_h1": dict(mamba_d_ssm=64, mamba_chunk_size=8),
    "nemotron_h": dict(mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8, conv_kernel=4),
    "qwen3_next": dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2),
    "gemma2": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "recurrent_gemma": dict(block_types=["recurrent", "recurrent", "attention"]),
    "deepseek_v2": dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2),
    "minicpm3": dict(num_key_value_heads=4),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "phi": dict(partial_rotary_factor=0.5),
    "esm": dict(mask_token_id=3, pad_token_id=0, position_embedding_type="absolute"),
    "funnel": dict(architectures=["FunnelModel"], block_sizes=[1, 3], block_repeats=[1, 1], num_decoder_layers=1),
    "clip_text_model": dict(projection_dim=16),
    "clip_vision_model": dict(projection_dim=16),
    "swin": dict(embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=2, patch_size=2),
    "focalnet": dict(embed_dim=16, depths=[2, 3], patch_size=2, focal_windows=[3, 3], focal_levels=[2, 2]),
    "convnext": dict(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 3, 1], image_size=64, patch_size=4, num_stages=4),
    "regnet": dict(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 3, 1], groups_width=8),
    "bit": dict(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 3, 1], num_groups=4),
    "pvt": dict(hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 3, 1], num_attention_heads=[1, 2, 2, 4]),
    "cvt": dict(embed_dim=[16, 16, 32], depth=[1, 2, 3], num_heads=[1, 2, 4]),
    "mobilevitv2": dict(image_size=64, patch_size=2),
    "mobilenet_v1": dict(depth_multiplier=0.25, min_depth=8, image_size=64),
    "yolos": dict(image_size=[32, 32], num_detection_tokens=5),
    "videomae": dict(num_frames=2, decoder_hidden_size=16, decoder_intermediate_size=16),
    "timesformer": dict(num_frames=2),
    "vivit": dict(num_frames=2),
    "whisper": dict(max_source_positions=20),
    "speech_to_text": dict(input_feat_per_channel=16, conv_channels=32),
    "wav2vec2": dict(conv_dim=(16,) * 3, conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2)),
    "data2vec-audio": dict(conv_dim=(16,) * 3, conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2)),
    "sew": dict(conv_dim=(16,) * 3, conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2)),
    "autoformer": dict(prediction_length=4, context_length=8, lags_sequence=[1, 2], label_length=2, moving_average=3),
    "patchtst": dict(num_input_channels=3, context_length=16, patch_length=4, patch_stride=4),
    "patchtsmixer": dict(num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, num_patches=4),
    "vit_tiny_patch16_224": dict(img_size=32),
    "deit_tiny_patch16_224": dict(img_size=32),
    "beit_base_patch16_224": dict(img_size=32, embed_dim=192, num_heads=3),
    "vit_relpos_small_patch16_224": dict(img_size=64),
}

# Inputs by keyword: the shape of random numbers, or ("ids", shape), ("count", shape), ("ones", shape).
VIDEO = dict(pixel_values=(1, 2, 3, 32, 32))
INPUTS = {
    "whisper": dict(input_features=(2, 16, 40), decoder_input_ids=("ids", (2, 16))),
    "speech_to_text": dict(input_features=(2, 40, 16), decoder_input_ids=("ids", (2, 16))),
    "audio-spectrogram-transformer": dict(input_values=(2, 1024, 16)),
    "videomae": VIDEO,
    "timesformer": VIDEO,
    "vivit": VIDEO,
    "patchtst": dict(past_values=(2, 16, 3)),
    "patchtsmixer": dict(past_values=(2, 16, 3)),
    "autoformer": dict(
        past_values=(2, 10),
        past_time_features=(2, 10, 0),
        past_observed_mask=("ones", (2, 10)),
        future_values=(2, 4),
        future_time_features=(2, 4, 0),
    ),
    "decision_transformer": dict(
        states=(1, 5, 17),
        actions=(1, 5, 4),
        rewards=(1, 5, 1),
        returns_to_go=(1, 5, 1),
        timesteps=("count", (1, 5)),
        attention_mask=("ones", (1, 5)),
    ),
}
UNCACHED = ("xlstm",)  # cannot run with the cache that it makes itself

# Side of the square test image of a timm model; 64 where nothing is said.
SIDES = {
    32: "vit_tiny_patch16_224 deit_tiny_patch16_224 beit_base_patch16_224",
    96: "inception_v4 xception41",
    224: """gmlp_ti16_224 resmlp_12_224 swin_tiny_patch4_window7_224 pit_ti_224 levit_128s coat_tiny convit_tiny
        coatnet_nano_rw_224 efficientformer_l1 efficientformerv2_s0 gcvit_xxtiny nest_tiny hiera_tiny_224
        eva02_tiny_patch14_224 tiny_vit_5m_224""",
}
SIDE = {name: side for side, names in SIDES.items() for name in names.split()}

# Lists that Duplicate refuses, and the words of the reason.
REFUSED = {
    ("xlm", "attentions"): "Beside it layer_norm1, ffns, layer_norm2 may go by the number of blocks too",
    ("xlm", "ffns"): "Beside it attentions, layer_norm1, layer_norm2 may go by the number of blocks too",
    ("yolos", "encoder.layer"): "Beside it encoder.interpolation.mid_position_embeddings",
    ("autoformer", "decoder.layers"): "uses more of what each of them gives",
    ("densenet121", "features"): "have names",
    ("dpn48b", "features"): "have names",
    ("coat_tiny", "parallel_blocks"): "a gate does not make it one either",
}
# Architectures whose configuration cannot say the new depth; their lists grow with stock=False.
NOT_STOCK = {
    "minicpm3": "residual_scale",
    "esm": "contact_head",
    "swin": "cannot express",
    "convnext": "cannot express",
    "focalnet": "cannot express",
    "mobilevitv2": "cannot express",
}

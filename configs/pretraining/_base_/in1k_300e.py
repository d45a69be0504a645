"""ImageNet-1K: 300 epochs of AdamW, 1024 images a step, 20 epochs of warm-up, cosine."""

_base_ = ["./imagenet.py", "./default_runtime.py"]
total_batch_size = 1024
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    # No weight decay on norms, biases and relative position bias tables.
    constructor="DenseOptimWrapperConstructor",
    paramwise_cfg=dict(no_decay_bias=True),
    clip_grad=dict(max_norm=5.0),
)
# Swin's 5e-4, 5e-7 and 5e-6 for 512 images, scaled to 1024.
param_scheduler = [
    dict(type="WarmupCosineLR", warmup=20, warmup_lr=1e-6, eta_min=1e-5, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=300)

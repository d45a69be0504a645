"""ImageNet-22K: 90 epochs of 14.2M images, 4096 a step, 5 epochs of warm-up, drop path 0.2.

The data is a folder per class; ``dataset.list_file`` takes a list of ``path<TAB>label`` lines or
Swin's JSON list.
"""

_base_ = "./in1k_300e.py"
train_dataloader = dict(
    batch_size=256, dataset=dict(root="data/imagenet22k/train", num_classes=21841)
)
val_dataloader = dict(dataset=dict(root="data/imagenet22k/val", num_classes=21841))
model = dict(num_classes=21841, drop_path_rate=0.2)
total_batch_size = 4096
# Swin's 1.25e-4, 1.25e-7 and 1.25e-6 for 512 images, scaled to 4096.
param_scheduler = [
    dict(type="WarmupCosineLR", warmup=5, warmup_lr=1e-6, eta_min=1e-5, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=90)

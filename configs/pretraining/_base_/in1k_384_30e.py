"""ImageNet-1K at 384x384 after 224x224: 30 epochs at a learning rate of 1e-5."""

_base_ = "./in1k_300e.py"
train_dataloader = dict(batch_size=64, dataset=dict(transform=dict(input_size=384)))
# As Swin evaluates 384x384: the whole photo, squashed.
val_dataloader = dict(
    dataset=dict(transform=dict(input_size=384, crop_pct=1.0, crop_mode="squash"))
)
model = dict(img_size=384, drop_path_rate=0.1)
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
# Constant learning rate.
param_scheduler = []
train_cfg = dict(max_epochs=30)

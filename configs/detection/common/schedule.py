"""36 epochs of COCO with AdamW, and the trainer's settings."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dense.optim import param_groups

# 117,266 images of train2017 have objects that are not crowds. At batch 16, an epoch has 7,329
# iterations, 36 epochs 263,848.
_EPOCH = 117_266 // 16
_ITERATIONS = 117_266 * 36 // 16

train = dict(
    output_dir="./output",
    init_checkpoint="",
    max_iter=_ITERATIONS,
    amp=dict(enabled=True, precision="float16"),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=_EPOCH, max_to_keep=5),
    eval_period=3 * _EPOCH,
    log_period=20,
    device="cuda",
    seed=-1,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[27, 33, 36]),
    # 500 iterations as in Swin, whose settings the paper adopts.
    warmup_length=500 / _ITERATIONS,
    warmup_factor=0.001,
)

optimizer = L(torch.optim.AdamW)(
    # No weight decay on norms (batch norms included) and relative position bias tables.
    params=L(param_groups)(base_lr="${..lr}", layer_decay=1.0),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)

"""Which tests belong to a source file: those that should notice a mistake in it."""

from pathlib import Path, PurePath

ROOT = Path(__file__).parents[2]
B, D, S, P = "tests/backbones", "tests/detection", "tests/segmentation", "tests/pretraining"
OPERATORS = (f"{B}/test_operators.py", f"{B}/test_sizes.py", f"{B}/test_ops_backends.py")
NETWORKS = ("references", "models", "pyramid", "mixers", "fused_parts")
NETWORKS = tuple(f"{B}/test_{name}.py" for name in NETWORKS)
FUSED = ("fused_parts", "fusion")
# What a graph is made of runs unmeasured, by a tracer or compiler.
GRAPHS = (f"{B}/test_tracing.py", f"{B}/test_export.py")
OPTIONS = "tests/dense/test_options.py"
LINES = ("tests/test_command_lines.py", "tests/dense/test_command_lines.py")
CALLS = f"{B}/test_native_calls.py"
DISPATCH = f"{B}/test_dispatch.py"
IN_C = (
    "depthwise.c",
    "factors.h",
    "inhomogeneous.c",
    "matrix.h",
    "product.h",
    "sliding.c",
    "windows.c",
)
BENCHMARK = "tests/dense/test_benchmark"
BENCHMARKS = tuple(f"{BENCHMARK}{part}.py" for part in ("_plans", "", "_results"))
BARS = "tests/dense/test_bars.py"
FILES = ("checkpoints", "load_reports", "layouts", "released")
FILES = tuple(f"{B}/test_{name}.py" for name in FILES)

# A file belongs to the first line whose beginning is its path's.
TESTS = {
    "backbones/ops/triton_kernels": (
        f"{B}/test_ops_triton.py",
        f"{B}/test_triton_kernels.py",
        f"{B}/test_kernel_inspection.py",
        CALLS,
    ),
    "backbones/ops/verdicts": (CALLS, f"{B}/test_verdicts.py", f"{B}/test_linear_layer.py"),
    "backbones/ops/cases": (f"{B}/test_check_command.py", f"{B}/test_verdicts.py"),
    "backbones/ops/__main__": (f"{B}/test_check_command.py", f"{B}/test_verdicts.py"),
    "backbones/ops/library": (f"{B}/test_library.py", DISPATCH),
    "backbones/ops/native": (*OPERATORS, f"{B}/test_library.py", DISPATCH),
    "backbones/ops/linear_layer": (f"{B}/test_linear_layer.py",),
    "backbones/ops/mlp.c": (f"{B}/test_residual_mlp.py",),
    "backbones/ops/residual_mlp": (f"{B}/test_residual_mlp.py", f"{B}/test_fused_parts.py"),
    "backbones/ops/linear": (f"{B}/test_linear.py", f"{B}/test_fusion.py"),
    **dict.fromkeys(
        (f"backbones/ops/{name}" for name in IN_C),
        (
            f"{B}/test_sizes.py",
            f"{B}/test_sixteen_bits.py",
            f"{B}/test_guarded_memory.py",
            *OPERATORS[::2],
        ),
    ),
    "backbones/ops/flops": (DISPATCH, f"{B}/test_sliding.py", "tests/test_complexity.py"),
    "backbones/ops/dispatch": (
        DISPATCH,
        *OPERATORS,
        f"{B}/test_linear.py",
        f"{B}/test_verdicts.py",
    ),
    "backbones/ops/common": (DISPATCH, *OPERATORS, f"{B}/test_determinism.py"),
    "backbones/ops/__init__": (f"{B}/test_tracing.py", *OPERATORS),
    "backbones/ops/": (
        CALLS,
        *OPERATORS,
        f"{B}/test_determinism.py",
        f"{B}/test_ordinary_parts.py",
    ),
    "backbones/mixers/shared": (*NETWORKS, f"{B}/test_shared_dw_conv.py"),
    "backbones/mixers/sliding": (*NETWORKS, f"{B}/test_sliding.py"),
    "backbones/mixers/norm": (*NETWORKS, f"{B}/test_norms.py"),
    "backbones/mixers/windowed": (*NETWORKS, *GRAPHS, f"{B}/test_ordinary_parts.py"),
    "backbones/mixers/": (*NETWORKS, f"{B}/test_ordinary_parts.py", f"{B}/test_tracing.py"),
    "backbones/ablations": ("tests/test_ablations.py", "tests/test_complexity.py"),
    "backbones/hosts": (f"{B}/test_hosts.py",),
    "backbones/folding": tuple(f"{B}/test_{name}.py" for name in (*FUSED, "mixers", "references")),
    "backbones/f": tuple(f"{B}/test_{name}.py" for name in (*FUSED, "references", "models")),
    "backbones/inference": tuple(f"{B}/test_{name}.py" for name in (*FUSED, "linear", "tracing")),
    "backbones/models": (f"{B}/test_models.py", f"{B}/test_released.py"),
    "backbones/layers": (*NETWORKS, f"{B}/test_added_parts.py", *GRAPHS),
    "backbones/pyramid": (
        *NETWORKS,
        f"{B}/test_added_parts.py",
        f"{B}/test_output_stride.py",
        f"{B}/test_encoders.py",
    ),
    "backbones/__main__": (f"{B}/test_models.py",),
    "backbones/reading": (f"{B}/test_reading.py", *FILES, "tests/test_convert_checkpoint.py"),
    "backbones/released": (f"{B}/test_reading.py", *FILES),
    "backbones/": (*FILES, "tests/test_convert_checkpoint.py"),
    "dense/analysis/benchmark/measure": BENCHMARKS[2:],
    "dense/analysis/benchmark/report": BENCHMARKS[1:],
    "dense/analysis/benchmark/models": (f"{BENCHMARK}_models.py",),
    "dense/analysis/benchmark/engines": (f"{BENCHMARK}_models.py", f"{BENCHMARK}.py"),
    "dense/analysis/benchmark": BENCHMARKS[:2],
    "dense/analysis/export_table": (
        "tests/export/test_table.py",
        "tests/export/test_table_rows.py",
    ),
    "dense/analysis/kernels/accesses": (
        f"{B}/test_kernel_accesses.py",
        f"{B}/test_triton_kernels.py",
    ),
    "dense/analysis/kernels": (f"{B}/test_kernel_inspection.py", f"{B}/test_triton_kernels.py"),
    "dense/analysis/comparison": (f"{P}/test_comparison.py", f"{P}/test_comparison_runs.py"),
    "dense/analysis/random_detectors": ("tests/export/test_detectors.py",),
    "dense/analysis/properties": ("tests/test_properties.py",),
    "dense/analysis/": (
        "tests/test_complexity.py",
        "tests/test_complexity_tool.py",
        "tests/test_recipes.py",
    ),
    "dense/backbone": (
        "tests/dense/test_dense_backbone.py",
        f"{B}/test_norms.py",
        f"{B}/test_fusion.py",
    ),
    "dense/demo": ("tests/test_make_scenes.py", "tests/test_demo.py"),
    "dense/detection/__init__": (f"{D}/test_backbone.py", "tests/test_packaging.py"),
    "dense/segmentation/__init__": (
        f"{S}/test_registration.py",
        "tests/dense/test_require.py",
        "tests/test_packaging.py",
    ),
    "dense/detection/browsing": (f"{D}/test_reporting.py", f"{D}/test_pages.py", BARS),
    "dense/detection/reporting": (f"{D}/test_reporting.py", f"{D}/test_pages.py", BARS),
    "dense/pretraining/browsing": (f"{P}/test_pages.py", BARS, f"{P}/test_browsing.py"),
    "dense/pretraining/reporting": (f"{P}/test_pages.py", BARS, f"{P}/test_browsing.py"),
    "dense/segmentation/browsing": (f"{S}/test_pages.py", BARS, f"{S}/test_browsing.py"),
    "dense/segmentation/reporting": (f"{S}/test_pages.py", BARS, f"{S}/test_browsing.py"),
    "dense/pretraining/__init__": ("tests/dense/test_require.py", f"{P}/test_tool.py"),
    "dense/run_report": (
        "tests/dense/test_run_report.py",
        *(f"{part}/test_pages.py" for part in (P, S, D)),
    ),
    "dense/detection/announcing": ("tests/dense/test_journal.py", f"{D}/test_pages.py"),
    "dense/openmmlab/announcing": ("tests/dense/test_journal.py", f"{S}/test_pages.py"),
    "dense/detection/annotations": (f"{D}/test_annotations.py", BARS),
    "dense/detection/cascade": (f"{D}/test_cascade.py",),
    "dense/detection/checkpoint": (f"{D}/test_checkpoint.py",),
    "dense/detection/data": (f"{D}/test_own_data.py", f"{D}/test_data.py"),
    "dense/detection/mapper": (f"{D}/test_loading.py", f"{D}/test_data.py"),
    "dense/detection/backbone": (f"{D}/test_backbone.py",),
    "dense/detection/tta": (f"{D}/test_tta.py",),
    "dense/detection/hooks": (
        f"{D}/test_hooks.py",
        f"{D}/test_run_options.py",
        f"{D}/test_resuming.py",
    ),
    "dense/detection/engine": (
        f"{D}/test_engine.py",
        f"{D}/test_order.py",
        f"{D}/test_train.py",
        f"{D}/test_resuming.py",
        f"{D}/test_run_options.py",
    ),
    "dense/detection/config": (
        f"{D}/test_loading.py",
        f"{D}/test_data.py",
        f"{D}/test_run_options.py",
        f"{D}/test_train.py",
    ),
    "dense/detection/predictor": (f"{D}/test_loading.py", f"{D}/test_train.py"),
    "dense/detection/resuming": (f"{D}/test_loading.py", f"{D}/test_resuming.py"),
    "dense/detection/trainer": (f"{D}/test_loading.py", f"{D}/test_resuming.py"),
    "dense/detection/": (f"{D}/test_train.py", f"{D}/test_resuming.py", "tests/test_predict.py"),
    "dense/coco": ("tests/test_coco_results.py",),
    "dense/drawing": ("tests/dense/test_drawing.py", "tests/test_overlays.py"),
    "dense/export": ("tests/export",),
    "dense/files": ("tests/dense/test_files.py",),
    "dense/finite": ("tests/dense/test_finite.py",),
    "dense/huggingface": ("tests/huggingface",),
    "dense/images": (
        "tests/dense/test_images.py",
        f"{P}/test_data.py",
        f"{S}/test_data.py",
        "tests/test_predict.py",
    ),
    "dense/metrics": ("tests/test_plot_metrics.py", "tests/dense/test_stopping.py"),
    "dense/openmmlab/mmcv": ("tests/test_mmcv_ext.py",),
    "dense/openmmlab/mmdetection": ("tests/test_mmdetection_parts.py", "tests/test_predict.py"),
    "dense/openmmlab/optim": ("tests/dense/test_optim.py",),
    "dense/openmmlab/tta": ("tests/test_mmdetection_parts.py", "tests/test_mmdetection.py"),
    "dense/openmmlab/hooks": tuple(f"{S}/test_{n}.py" for n in ("hooks", "run_options", "runner")),
    "dense/openmmlab/logs": (f"{S}/test_hooks.py", f"{S}/test_runner.py"),
    "dense/openmmlab/resuming": (f"{S}/test_loops.py", f"{P}/test_resuming.py"),
    "dense/openmmlab/schedule": (f"{S}/test_loops.py", f"{P}/test_configs.py"),
    "dense/openmmlab/checkpoints": (f"{S}/test_checkpoints.py", f"{S}/test_runner.py"),
    "dense/openmmlab/config": (
        *(f"{S}/test_{name}.py" for name in ("settings", "lengths", "run_options", "tta")),
        f"{P}/test_tool.py",
    ),
    "dense/openmmlab/backbone": (
        f"{S}/test_settings.py",
        f"{S}/test_registration.py",
        f"{S}/test_plugging_in.py",
        f"{S}/test_methods.py",
    ),
    "dense/openmmlab/checking": (f"{S}/test_checking.py",),
    "dense/openmmlab/runner": (f"{S}/test_building.py", f"{S}/test_runner.py"),
    "dense/openmmlab/": (f"{P}/test_tool.py", f"{P}/test_resuming.py", f"{S}/test_runner.py"),
    "dense/optim": ("tests/dense/test_optim.py",),
    "dense/options": (
        OPTIONS,
        "tests/dense/test_stopping.py",
        f"{P}/test_tool.py",
        f"{S}/test_tools.py",
        f"{D}/test_train.py",
    ),
    "dense/prediction": (
        "tests/dense/test_prediction.py",
        "tests/test_predict.py",
        "tests/test_overlays.py",
    ),
    "dense/pretraining/config": tuple(f"{P}/test_{n}.py" for n in ("parts", "configs", "tool")),
    "dense/pretraining/predictor": (f"{P}/test_parts.py", "tests/test_predict.py"),
    "dense/pretraining/data": (f"{P}/test_readers.py", f"{P}/test_data.py", f"{P}/test_tool.py"),
    "dense/pretraining/": tuple(
        f"{P}/test_{name}.py" for name in ("parts", "data", "tool", "resuming")
    ),
    "dense/publish": ("tests/test_publish_checkpoint.py",),
    "dense/recipes": ("tests/test_recipes.py", "tests/test_packaging.py"),
    "dense/report": ("tests/dense/test_report.py", "tests/test_demo.py"),
    "dense/runs": ("tests/dense/test_runs.py",),
    "dense/seeding": (
        "tests/dense/test_seeding.py",
        *(f"{part}/test_resuming.py" for part in (P, S, D)),
    ),
    "dense/segmentation/config": (
        f"{S}/test_own_settings.py",
        f"{S}/test_data.py",
        f"{S}/test_configs.py",
        f"{S}/test_tools.py",
        f"{S}/test_own_data.py",
        f"{S}/test_tta.py",
    ),
    "dense/segmentation/predictor": (f"{S}/test_predictor.py", "tests/test_predict.py"),
    "dense/segmentation/dataset": tuple(f"{S}/test_{n}.py" for n in ("masks", "data", "own_data")),
    "dense/segmentation/data": tuple(f"{S}/test_{n}.py" for n in ("masks", "data", "own_data")),
    "dense/segmentation/losses": (f"{S}/test_masks.py", f"{S}/test_data.py"),
    "dense/segmentation/": (f"{S}/test_data.py", f"{S}/test_own_data.py", f"{S}/test_runner.py"),
    "dense/steps": ("tests/dense/test_steps.py", "tests/test_demo.py", f"{P}/test_comparison.py"),
    "dense/": ("tests/dense",),
    "configs/detection/methods": (f"{D}/test_methods.py",),
    "configs/detection/common/zoo": (f"{D}/test_methods.py",),
    "configs/mmdetection/methods": (
        "tests/test_mmdetection_configs.py",
        "tests/test_mmdetection_methods.py",
    ),
    "configs/segmentation/methods": (f"{S}/test_methods.py",),
    "configs/segmentation/_base_/datasets/cityscapes": (f"{S}/test_methods.py",),
    "configs/detection": (f"{D}/test_settings.py", f"{D}/test_configs.py"),
    "configs/mmdetection": (
        "tests/test_mmdetection_configs.py",
        "tests/test_mmdetection.py",
        "tests/test_mmdetection_methods.py",
    ),
    "configs/pretraining": (f"{P}/test_configs.py",),
    "configs/segmentation": (f"{S}/test_configs.py", f"{S}/test_methods.py"),
    "tools/report": (f"{P}/test_pages.py", f"{S}/test_pages.py", f"{D}/test_pages.py"),
    "tools/export": ("tests/export",),
    "tools/browse_data": (
        f"{P}/test_command.py",
        *(f"{part}/test_pages.py" for part in (P, S, D)),
    ),
    "tools/benchmark": BENCHMARKS[1:],
    "tools/compare_families": (f"{P}/test_comparison.py", f"{P}/test_comparison_runs.py"),
    "tools/complexity": ("tests/test_complexity.py", "tests/test_complexity_tool.py"),
    "tools/demo_chain": ("tests/test_demo_chain.py",),
    "tools/demo": ("tests/test_demo.py", "tests/test_demo_commands.py"),
    "tools/inspect_kernels": (f"{B}/test_kernel_inspection.py", f"{B}/test_triton_kernels.py"),
    "tools/pretrain": (f"{P}/test_command.py", f"{P}/test_tool.py"),
    "tools/predict": ("tests/test_predict.py", "tests/test_predict_tool.py"),
    "tools/publish_checkpoint": (
        "tests/test_publish_checkpoint.py",
        "tests/huggingface/test_folder.py",
    ),
    "tools/setup_environment": ("tests/test_setup.py", "tests/test_setting_up.py"),
    "tools/show_kernels": ("tests/test_show_kernels.py", "tests/test_properties.py"),
    "tools/test_segmentor": (
        f"{S}/test_command.py",
        f"{S}/test_tools.py",
        f"{S}/test_own_data.py",
        f"{S}/test_tta.py",
    ),
    "tools/test_versions": ("tests/test_versions.py",),
    "tools/train_detector": (f"{D}/test_command.py", f"{D}/test_train.py", f"{D}/test_data.py"),
    "tools/train_segmentor": (
        f"{S}/test_command.py",
        f"{S}/test_lengths.py",
        f"{S}/test_tools.py",
        f"{S}/test_runner.py",
    ),
}


def covering(path: str) -> tuple[str, ...]:
    """The test files of a source; a tool's own ``test_<name>.py`` or all if no line has it."""
    for beginning, tests in TESTS.items():
        if path.startswith(beginning):
            return (*tests, *LINES, OPTIONS) if path.startswith("tools/") else tests
    own = f"tests/test_{PurePath(path).stem}.py"
    return (own, *LINES, OPTIONS) if (ROOT / own).exists() else ("tests",)

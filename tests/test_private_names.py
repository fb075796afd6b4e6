"""No module of bisam uses a private name of another one; private names of other libraries stand in one list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bisam

ROOT = Path(bisam.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}

# Private names of other libraries that bisam uses. Each may change with a version of the library, so each is a place to
# look at when an update fails.
OTHERS: dict[str, set[str]] = {
    "torch: fused operations on lists of tensors": {
        "_foreach_abs",
        "_foreach_add",
        "_foreach_add_",
        "_foreach_clamp_max",
        "_foreach_clamp_min",
        "_foreach_clone",
        "_foreach_copy_",
        "_foreach_div",
        "_foreach_lerp_",
        "_foreach_maximum",
        "_foreach_mul",
        "_foreach_mul_",
        "_foreach_neg",
        "_foreach_norm",
        "_foreach_sqrt",
        "_foreach_sub",
        "_foreach_sub_",
    },
    "torch: flatten_dense_tensors, subclasses without __torch_function__": {
        "_C",
        "_nn",
        "_disabled_torch_function_impl",
    },
    "torch: a check that does not wait for the device": {"_assert_async"},
    "torch: pytrees": {"_pytree"},
    "torch: whether a graph is kept": {"_autograd", "_get_current_graph_task_keep_graph"},
    "torch: whether a backward pass is running": {"_current_graph_task_id"},
    "torch: whether a backward pass stores the gradient of a leaf": {"_will_engine_execute_node"},
    "torch: who else refers to a tensor": {"_cdata", "_is_view", "_storage_Use_Count"},
    "torch.nn.Module": {"_buffers", "_modules", "_parameters"},
    "torch.Tensor": {"_backward_hooks", "_version"},
    "torch.amp.GradScaler": {"_device"},
    "torch.optim.Optimizer": {
        "_optimizer_load_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_global_optimizer_post_hooks",
        "_global_optimizer_pre_hooks",
    },
    "torch.distributed": {"_device_types", "_get_backend", "_get_default_store", "_timeout"},
    "DistributedDataParallel": {"_get_active_ddp_module", "_join_config"},
    "FSDP2": {
        "_all_gather_result",
        "_fsdp_param_group",
        "_fsdp_param_groups",
        "_get_fsdp_state",
        "_is_root",
        "_post_accumulate_grad_hooks",
        "_state_ctx",
        "_unsharded_param",
    },
    "optuna: the trial of an earlier process": {"_trial_id"},
    "curvlinops: the base class of its operators": {"_torch_base"},
    "os": {"_exit"},
    "torchvision": {"_download_url_prefix", "_image_files", "_images", "_labels"},
    "Lightning Fabric": {"_precision"},
    "transformers": {"_loss_shifts_labels", "_require_grads_hooks"},
}
ALLOWED = set[str]().union(*OTHERS.values())


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, variables, attributes of self, and slots."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if is_private(name)}


def used(tree: ast.AST) -> set[str]:
    """Private names that a module asks others for: attributes, imports, and strings of getattr and hasattr."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names} | set((node.module or "").split("."))
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in names if is_private(name)}


def foreign(source: str) -> set[str]:
    tree = ast.parse(source)
    return used(tree) - defined(tree)


@pytest.mark.parametrize("file", FILES)
def test_a_private_name_of_another_module_is_not_used(file):
    names = foreign(FILES[file].read_text()) - ALLOWED
    assert not names, f"{file}: give them public names, or list them if another library has them: {sorted(names)}"


def test_the_list_has_no_name_that_is_not_used():
    found = set[str]().union(*[foreign(path.read_text()) for path in FILES.values()])
    assert found >= ALLOWED


def test_fsdp_is_known_to_one_file():
    assert [file for file, path in FILES.items() if foreign(path.read_text()) & OTHERS["FSDP2"]] == [
        "distributed/fsdp.py"
    ]


def test_ddp_is_known_to_one_file():
    assert [file for file, path in FILES.items() if foreign(path.read_text()) & OTHERS["DistributedDataParallel"]] == [
        "distributed/ddp.py"
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("oracle._state", {"_state"}),
        ("from bisam.state import _packed", {"_packed"}),
        ("class A:\n    def __init__(self): self._a = 1\n    def f(self, b): return b._a", set()),
        ("getattr(p, '_hooks', None)", {"_hooks"}),
        ("import torch._C", {"_C"}),
        ("def f(_x): return _x", set()),
        ("other._x = 1", {"_x"}),
        ("x.__dict__", set()),
    ],
)
def test_the_checker_sees_what_is_private(source, found):
    assert foreign(source) == found

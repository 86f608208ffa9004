import torch

from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import with_outputs
from qimera.graph.stepping import SteppedRun
from qimera.teacher.teacher import Teacher


def test_a_branch_of_a_walk_leaves_the_walk_where_it_was(teacher: Teacher, toy_images: torch.Tensor) -> None:
    module, images = with_outputs(fold_batch_norms(teacher.module), []), toy_images[:4]
    walk = SteppedRun(module, images)
    layer = next(node for node in module.graph.nodes if node.target is torch.ops.aten.linear.default)
    walk.advance_before(layer.name)
    branch = walk.branch()
    branch.put(torch.zeros(4, teacher.num_classes))
    ended = branch.finish()
    assert isinstance(ended, tuple)
    assert not ended[0].any()
    straight = walk.finish()
    assert isinstance(straight, tuple)
    assert torch.equal(straight[0], module(images)[0])


def test_a_walk_goes_on_from_the_value_that_it_is_given(teacher: Teacher, toy_images: torch.Tensor) -> None:
    module, images = with_outputs(fold_batch_norms(teacher.module), []), toy_images[:4]
    layer = next(node for node in module.graph.nodes if node.target is torch.ops.aten.linear.default)
    walk = SteppedRun(module, images)
    assert walk.advance_to(layer.name)
    walk.set_(layer.name, 2 * walk.value(layer.name))
    ended = walk.finish()
    assert isinstance(ended, tuple)
    assert torch.equal(ended[0], 2 * module(images)[0])

"""Paths inside: how the arrays of a compiled kernel lie in memory.

A fused loop runs fastest along the paths, many numbers of one kind, one after the other. But coefficients build their
results a path a row, torch.stack((a, b), 1), and such an array is written with a stride, number by number. This pass over
the graph of a kernel joins the parts one after the other instead and looks at the result sideways: the same values, other
strides. The generator and a two-dimensional drift then run twice as fast.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

LONG = 64  # a fixed size beyond this counts as paths, as every dynamic one does


class PathsInside(CustomGraphPass):
    """Rewrites concatenations along an axis to the right of the paths into concatenations along the first."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
            value = node.meta["val"]
            axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value.dim()
            if any(not isinstance(size, int) or size > LONG for size in value.shape[:axis]):
                self._rewrite(graph, node, axis)

    def uuid(self) -> bytes:
        """What tells compiled code in the cache apart."""
        return get_hash_for_files((__file__,))

    def _rewrite(self, graph: Graph, node: Node, axis: int) -> None:
        value = node.meta["val"]
        order = [axis, *(k for k in range(value.dim()) if k != axis)]

        def permuted(x: Node, order: list[int]) -> Node:
            y = graph.call_function(torch.ops.aten.permute.default, (x, order))
            y.meta["val"] = x.meta["val"].permute(order)
            return y

        with graph.inserting_before(node):
            parts = [permuted(x, order) for x in cast(Sequence[Node], node.args[0])]
            joined = graph.call_function(torch.ops.aten.cat.default, (parts,))
            joined.meta["val"] = value.permute(order).contiguous()
            node.replace_all_uses_with(permuted(joined, [order.index(k) for k in range(value.dim())]))
        graph.erase_node(node)

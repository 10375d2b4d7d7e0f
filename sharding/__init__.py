"""Meshes, logical-axis rules, and the few functions through which models meet them."""

from sharding.ambient import (
    ambient_mesh,
    ambient_rules,
    constrain,
    einsum,
    ensure_mesh,
    first,
    gathered,
    local,
    lookup,
    param,
    shards,
    spec,
    use,
)
from sharding.mesh import ShardingError, mesh, parse_mesh
from sharding.rules import RULES, Rules, rules

__all__ = [
    "RULES", "Rules", "ShardingError", "ambient_mesh", "ambient_rules", "constrain", "einsum",
    "ensure_mesh", "first", "gathered", "local", "lookup", "mesh", "param", "parse_mesh",
    "rules", "shards", "spec", "use",
]

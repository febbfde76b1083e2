"""What a store holds, a store without its last views, or at another place."""

import math

import cache
from cache import UserError
from cache.codec import Features
from pipeline.config import Store
from pipeline.system.terminal import decimal, progress, summary


def run(config: Store) -> None:
    """Print, prune or copy. Raises UserError for a store that cannot be opened, or options that do not fit."""
    for option, value, action in (("--to", config.to, "copy"), ("--views", config.views, "prune")):
        if (value is None) == (config.action == action):
            fix = f"give {option}" if value is None else f"leave {option} out"
            raise UserError(f"store {config.action} {'needs' if value is None else 'takes no'} {option}", fix=fix)
    store, title = cache.open(config.store), "store"
    if config.action == "prune":
        assert config.views is not None  # as checked above
        before = sum(store.sizes().values())
        store = cache.prune(store, config.views)
        title = f"pruned store, {decimal(before - sum(store.sizes().values()))} freed"
    if config.action == "copy":
        assert config.to is not None
        with progress("copy", store.manifest.views * store.manifest.blocks, "blocks") as advance:
            store, title = cache.copy(store, config.to, lambda *_: advance(1)), "copied store"
    summary(title, _facts(store))


def _facts(store: cache.Store) -> dict:
    manifest, sizes, missing = store.manifest, store.sizes(), len(store.missing_blocks())
    blocks, fidelity = manifest.views * manifest.blocks, manifest.fidelity
    vectors = 2 * manifest.samples * manifest.views * (1 - missing / blocks)
    whole = sum(sizes.values())
    budget = fidelity.get("budget")
    return {
        "store": store.path,
        "format": manifest.format,
        "teacher": f"{manifest.teacher}, weights {manifest.teacher_weights:.12}"
        + (f", which saw views of {manifest.teacher_size} px" if manifest.teacher_size else ""),
        "data": f"{manifest.samples:,} samples of {manifest.classes:,} classes, fingerprint {manifest.dataset:.12}",
        "views": f"{manifest.views} of policy {manifest.policy.get('name', '?')}, {manifest.size} px",
        "seed": manifest.seed,
        "code": f"{manifest.codec['name']} for T = {manifest.temperature:g}"
        + (f", {budget:g} nats" if isinstance(budget, float) else "")
        + (f"; {store.codec.width:,} features and their head" if isinstance(store.codec, Features) else ""),
        "blocks": f"{blocks - missing:,} of {blocks:,} of {manifest.block_rows:,} rows",
        **{name: decimal(size) for name, size in sizes.items() if size},
        "all told": f"{decimal(whole)}, {whole / vectors if vectors else math.nan:.1f} bytes per vector",
        "a plane in memory": decimal(manifest.samples * (store.codec.row_bytes + 8 + 4 * store.energies)),
    }

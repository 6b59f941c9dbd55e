"""Checks of appendix A, run in its kernel after the last cell: who found what, and that no row of the table is lost."""

shards = [name(number) for number in (2, 3, 4, 5)]
assert [by_hand[shard] for shard in shards] == ["name", "size", "size", "sha256"]
assert [kinds[shard] for shard in shards] == ["missing", "lfs_pointer", "truncated", "checksum"]
assert set(kinds) == set(shards) == set(links)
assert len(mixed) == 3
assert {problem.kind for problem in mixed} == {"version"}
assert not broken.exists()

assert len(table) >= 40
assert len(parts) == 2 * len(groups)
for row in table:
    assert sum(f"\n| {row['fault'].replace('_', chr(92) + '_')} |" in part for part in parts) == 1, row["fault"]

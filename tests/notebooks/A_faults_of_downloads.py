"""Checks of appendix A, run in its kernel after the last cell: who found what, and that no row of the table is lost."""

from pathlib import Path

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

# A source that misbehaves: each fault met once, as the text tells; files that were right are asked for once.
text = Path("A_faults_of_downloads.ipynb").read_text(encoding="utf-8")
assert (call, faults) == (3, {})
assert "Three calls." in text
assert [(file, fault) for file, _, fault in requests if fault] == [
    (name(1), "cut"),
    (name(2), "one bit"),
    (name(3), "sign in"),
]
asked = [file for file, _, _ in requests]
assert all(asked.count(file) == 1 + (file in {name(1), name(2), name(3)}) for file in facts["files"])
assert [file for file, begin, _ in requests if begin] == [name(1)]
assert again == sent
assert not fetched.exists()

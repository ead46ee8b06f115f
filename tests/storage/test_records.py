import pytest

from scopeatlas.errors import NotReadyError, StoreError
from scopeatlas.storage import records
from scopeatlas.storage.files import file_sha256
from scopeatlas.storage.records import ShardKey, StageFolder, generation

KEY, OTHER = ShardKey("03", "a" * 64), ShardKey("04", "b" * 64)


@pytest.fixture
def stage(tmp_path) -> StageFolder:
    return StageFolder(tmp_path / "activations")


def finish(stage: StageFolder, key: ShardKey, content: str = "data"):
    stage.root.mkdir(exist_ok=True)
    path = stage.data_path(key, ".bin")
    path.write_text(content)
    return stage.commit(key, [path], {"tokens": 5})


def test_a_shard_is_done_once_its_record_stands(stage):
    assert not stage.is_done(KEY) and stage.pending([KEY, OTHER]) == [KEY, OTHER]
    stage.root.mkdir()
    stage.data_path(KEY, ".bin").write_text("data")
    assert not stage.is_done(KEY)
    record = finish(stage, KEY)
    assert stage.is_done(KEY) and stage.pending([KEY, OTHER]) == [OTHER]
    path = stage.data_path(KEY, ".bin")
    assert record.files == {path.name: {"bytes": 4, "sha256": file_sha256(path)}} and record.facts == {"tokens": 5}


def test_a_record_that_exists_wins(stage):
    first = finish(stage, KEY)
    assert stage.commit(KEY, [], {"tokens": 6}) == first


def test_a_shard_that_is_not_done_says_which_stage_to_run(stage):
    with pytest.raises(NotReadyError, match="activations shard 03 is not done: no .*commit.json; run that stage first"):
        stage.record(KEY)
    finish(stage, KEY)
    with pytest.raises(NotReadyError, match="shard 04"):
        stage.manifest([KEY, OTHER])


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("dat")])
def test_a_shard_whose_data_is_gone_or_short_is_to_be_done_again(stage, damage):
    finish(stage, KEY)
    damage(stage.data_path(KEY, ".bin"))
    assert not stage.is_done(KEY) and not list(stage.root.glob("*.commit.json"))
    finish(stage, KEY, "other")
    assert stage.is_done(KEY)


def test_a_record_that_is_none_is_named(stage):
    finish(stage, KEY)
    next(stage.root.glob("*.commit.json")).write_text("{}")
    with pytest.raises(StoreError, match="is not a commit record .*delete it"):
        stage.record(KEY)


def test_another_identity_is_another_shard(stage):
    old, new = finish(stage, KEY), finish(stage, ShardKey("03", "c" * 64))
    assert list(stage.records()) == [old, new]


def test_a_shard_that_another_machine_commits_while_one_looks_keeps_its_record(stage, monkeypatch):
    """The other one commits after whichever look comes first."""
    finish(stage, KEY)

    def then_commit(look):
        def looked(*arguments):
            found = look(*arguments)
            if not stage.data_path(OTHER, ".bin").exists():
                finish(stage, OTHER)
            return found

        return looked

    for name in ("read_all", "sizes_under"):
        monkeypatch.setattr(records, name, then_commit(getattr(records, name)))
    assert set(stage.pending([KEY, OTHER])) <= {OTHER}
    assert stage.is_done(OTHER) and [record.key for record in stage.records()] == [KEY, OTHER]


def test_discarding_a_shard_frees_its_bytes_and_forgets_it(stage):
    assert stage.discard(finish(stage, KEY, "12345")) == 5
    assert not list(stage.root.iterdir()) and not stage.is_done(KEY)


def test_a_pruned_shard_counts_as_done_only_for_who_needs_none_of_its_data(stage):
    assert stage.prune(finish(stage, KEY, "12345")) == 5
    assert stage.is_pruned(KEY) and stage.is_done(KEY, or_pruned=True) and not stage.is_done(KEY)
    with pytest.raises(NotReadyError, match="was pruned from .*run that stage again"):
        stage.record(KEY)
    finish(stage, KEY, "12345")
    assert stage.is_done(KEY) and not stage.is_pruned(KEY)


def test_the_generation_follows_the_identities_and_not_their_order():
    assert generation([KEY, OTHER]) == generation([OTHER, KEY]) != generation([KEY])

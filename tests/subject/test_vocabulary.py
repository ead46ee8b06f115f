from scopeatlas.subject.vocabulary import token_texts


def test_the_texts_of_tokens_join_to_the_text(subject):
    text = "The  quick brown-fox, Ünïcode «quotes» 東京\n\n\tdef f(x): return 3.14 😀 end"
    ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    plain = [i for i, piece in zip(ids, subject.tokenizer.convert_ids_to_tokens(ids), strict=True) if not piece.startswith("<0x")]
    assert "".join(token_texts(subject.tokenizer, plain)) == subject.tokenizer.decode(plain)
    assert len(plain) > 20


def test_leading_spaces_are_kept_and_padding_is_empty(subject):
    ids = subject.tokenizer("a river", add_special_tokens=False)["input_ids"]
    assert token_texts(subject.tokenizer, [*ids, -1]) == ["a", " river", ""]


def test_byte_tokens_read_as_the_character_they_spell(subject):
    ids = subject.tokenizer.convert_tokens_to_ids(["<0x41>", "<0x0A>", "<0xE2>"])
    assert token_texts(subject.tokenizer, ids) == ["A", "\n", "�"]


def test_byte_level_tokens_read_as_the_characters_that_their_bytes_spell():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("Ã", "©"), ("Ġ", "Ã©")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "Ã©", "ĠÃ©"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    ids = tokenizer("é é\n<|endoftext|>ü")["input_ids"]
    assert token_texts(tokenizer, [*ids, -1]) == ["é", " é", "\n", "<|endoftext|>", "�", "�", ""]

"""`--trainable_embeddings new`: the added rows train as they would in the whole matrices, and the others stay."""

import copy

import pytest
import torch
from helpers import noise

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.model.weights import save_checkpoint
from self1e.training.new_rows import merge_new_rows, train_new_rows

pytestmark = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture
def loaded(tied, tiny_version, make_tiny):
    """A model whose embedding and `lm_head` train, its processor, and a batch with a mask."""
    version = make_tiny(tie_word_embeddings=True) if tied else tiny_version
    torch.manual_seed(0)
    model, processor = Self1EForSegmentation.from_pretrained(version), Self1EProcessor.from_pretrained(version)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name or name.startswith("lm_head"))
    batch = processor(
        images=[noise(60, 40)],
        conversations=[[["<image>\nthe cat?", "Sure, [SEG]."]]],
        mask_targets=[torch.ones(1, 40, 60, dtype=torch.uint8)],
    )
    return model, processor, batch


def step(model, batch, lr: float = 0.1) -> float:
    """One step of plain gradient descent; returns the loss before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def matrices(model) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()]


def test_the_added_rows_move_as_in_the_whole_matrices_and_the_rest_stays(loaded):
    whole, _, batch = loaded
    first = whole.config.seg_token_id
    apart = copy.deepcopy(whole)
    before = [matrix.clone() for matrix in matrices(whole)]
    train_new_rows(apart, first)
    trained = [name for name, parameter in apart.named_parameters() if parameter.requires_grad]
    assert trained and all(name.endswith(".new_rows") for name in trained)
    assert step(apart, batch) == pytest.approx(step(whole, batch), rel=1e-6)
    merge_new_rows(apart)
    assert apart.state_dict().keys() == whole.state_dict().keys()
    for ours, theirs, start in zip(matrices(apart), matrices(whole), before):
        assert torch.equal(ours[:first], start[:first]) and not torch.equal(theirs[:first], start[:first])
        assert not torch.equal(ours[first:], start[first:])
        torch.testing.assert_close(ours[first:], theirs[first:], rtol=1e-4, atol=1e-7)


def test_a_merged_model_is_saved_and_answers_as_the_trained_one(loaded, tmp_path):
    model, processor, batch = loaded
    train_new_rows(model, model.config.seg_token_id)
    step(model, batch, lr=10)
    trained = model(**batch).loss.item()
    merge_new_rows(model)
    assert model(**batch).loss.item() == pytest.approx(trained, rel=1e-6)
    model.trained_head = True
    save_checkpoint(model, processor, tmp_path / "saved")
    assert Self1EForSegmentation.from_pretrained(tmp_path / "saved")(**batch).loss.item() == pytest.approx(trained)


def test_a_vocabulary_without_added_tokens_is_refused(loaded):
    with pytest.raises(ValueError, match="holds none from"):
        train_new_rows(loaded[0], 10_000)

"""What a WAELoss says once about its use: it has a state, which belongs to one training of one model."""

import pytest
import torch
from programs import AutoEncoder

from pyro_wae import WAELoss

X = torch.linspace(-1, 1, 24).reshape(8, 3)


def train(loss, net, steps=1):
    for _ in range(steps):
        loss.loss_and_grads(net.model, net.guide, X)


def test_a_loss_made_anew_for_each_step_is_said_at_the_fifth_and_not_without_a_state():
    net = AutoEncoder(3, 2)
    for _ in range(4):
        train(WAELoss(), net)
    with pytest.warns(UserWarning, match="made anew for each step of one model"):
        train(WAELoss(), net)
    other = AutoEncoder(3, 2)
    for _ in range(6):
        train(WAELoss(penalty_weight=1.0), other)


def test_losses_that_train_on_are_made_anew_by_nobody():
    net = AutoEncoder(3, 2)
    for _ in range(6):
        train(WAELoss(), net, steps=2)


def test_a_loss_that_goes_to_another_model_and_guide_says_what_it_keeps():
    loss, net, other = WAELoss(), AutoEncoder(3, 2), AutoEncoder(3, 2)
    train(loss, net)
    loss.loss_and_grads(net.model, other.guide, X)  # a guide may be replaced
    with pytest.warns(UserWarning, match="trained with another model and guide.*Make a WAELoss for each model"):
        train(loss, other)
    train(loss, other)


def test_a_new_loss_that_is_evaluated_beside_a_trained_one_says_which_to_take():
    loss, net = WAELoss(), AutoEncoder(3, 2)
    train(loss, net, steps=2)
    with pytest.warns(UserWarning, match="has not been trained, and another one has been.*penalty_weight=100"):
        WAELoss().loss(net.model, net.guide, X)
    WAELoss(penalty_weight=1.0).loss(net.model, net.guide, X)
    loss.loss(net.model, net.guide, X)

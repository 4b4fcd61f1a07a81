"""The sum that is back-propagated has no name; its parts have. A run of updates in a method.

Expected: the step has no `loss=`, or `loss=` is the same sum; never one of its parts under the
name `loss`, least of all the entropy, which is subtracted. `update` is called per rollout from
the loop below: its `init` and `finish`, if any, are outside of it. `evaluate_actions` is no
evaluation.
"""
import torch
from torch import nn


class PPO:
    def __init__(self, policy, epochs=2):
        self.policy = policy
        self.epochs = epochs
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)

    def update(self, rollouts):
        value_loss_epoch = 0
        for e in range(self.epochs):
            for sample in rollouts:
                states, returns = sample
                values, entropy = self.policy.evaluate_actions(states)
                value_loss = nn.functional.mse_loss(values, returns)
                action_loss = (values * returns).mean()
                self.optimizer.zero_grad()
                (value_loss * 0.5 + action_loss - entropy * 0.01).backward()
                self.optimizer.step()
                value_loss_epoch += value_loss.item()
        return value_loss_epoch / (self.epochs * len(rollouts))


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 1)

    def evaluate_actions(self, states):
        values = self.base(states)
        return values, values.sigmoid().mean()


def main():
    torch.manual_seed(42)
    agent = PPO(Policy())
    for j in range(3):
        rollouts = [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(2)]
        print("value loss", j, agent.update(rollouts))
    print("final", sum(p.double().sum().item() for p in agent.policy.parameters()))


if __name__ == "__main__":
    main()

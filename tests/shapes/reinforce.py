"""Reinforcement learning: `env.step` beside `optimizer.step`, the update in `finish_episode()`."""
import torch
import torch.nn as nn
import torch.optim as optim
from torch.distributions import Categorical


class Env:
    def reset(self):
        self.state, self.count = torch.zeros(4), 0
        return self.state

    def step(self, action):
        self.count += 1
        self.state = self.state + (0.1 if action else -0.1)
        return self.state, float(action), self.count >= 6


torch.manual_seed(543)
env = Env()
policy = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(-1))
policy.saved_log_probs = []
policy.rewards = []
optimizer = optim.Adam(policy.parameters(), lr=1e-2)


def select_action(state):
    m = Categorical(policy(state))
    action = m.sample()
    policy.saved_log_probs.append(m.log_prob(action))
    return action.item()


def finish_episode():
    R = 0
    returns = []
    for r in policy.rewards[::-1]:
        R = r + 0.99 * R
        returns.insert(0, R)
    policy_loss = []
    for log_prob, R in zip(policy.saved_log_probs, returns):
        policy_loss.append(-log_prob * R)
    optimizer.zero_grad()
    policy_loss = torch.stack(policy_loss).sum()
    policy_loss.backward()
    optimizer.step()
    del policy.rewards[:]
    del policy.saved_log_probs[:]


def main():
    running_reward = 10
    for i_episode in range(8):
        obs, ep_reward = env.reset(), 0
        for t in range(1, 100):
            action = select_action(obs)
            obs, reward, done = env.step(action)
            policy.rewards.append(reward)
            ep_reward += reward
            if done:
                break
        running_reward = 0.05 * ep_reward + (1 - 0.05) * running_reward
        finish_episode()
        print('Episode {}\tAverage reward: {:.2f}'.format(i_episode, running_reward))


if __name__ == '__main__':
    main()
    print("final", sum(p.double().sum().item() for p in policy.parameters()))

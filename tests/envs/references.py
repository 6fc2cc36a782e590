"""Slow float64 references of the native environments: explicit loops over agents, arrays over episodes [E, ...]."""

import math

import numpy as np


def matrix_reward(kind: str, actions: np.ndarray) -> np.ndarray:
    """actions [E, N] -> rewards [E, N]."""
    episodes, agents = actions.shape
    reward = np.zeros((episodes, agents))
    for e in range(episodes):
        for i in range(agents):
            k = sum(1 for a in actions[e] if a == actions[e, i])
            reward[e, i] = 1 / k if kind == "specialisation" else k / agents
    return reward


def dispersion_force(action: np.ndarray) -> np.ndarray:
    """Discrete action [E, N] -> force [E, N, 2]."""
    table = {0: 0.0, 1: -1.0, 2: 1.0}
    pairs = [[(table[a // 3], table[a % 3]) for a in row] for row in action.tolist()]
    return np.array(pairs)


def dispersion(pos, vel, food, eaten, force, share_reward=False, penalise_by_time=False):
    """One step. pos, vel, force [E, N, 2]; food [E, F, 2]; eaten [E, F] -> (pos, vel, eaten, reward, obs)."""
    vel = vel * 0.75 + force * 0.1
    pos = np.minimum(np.maximum(pos + vel * 0.1, -1.0), 1.0)
    episodes, agents, foods = pos.shape[0], pos.shape[1], food.shape[1]
    reward, eaten_now = np.zeros((episodes, agents)), eaten.copy()
    for f in range(foods):
        on = [np.hypot(*(pos[:, i] - food[:, f]).T) < 0.085 for i in range(agents)]
        k = sum(o.astype(int) for o in on)
        fresh = ~eaten[:, f] & (k > 0)
        for i in range(agents):
            if share_reward:
                reward[:, i] += fresh
            else:
                reward[:, i] += np.where(fresh & on[i], 1 / np.maximum(k, 1), 0.0)
        eaten_now[:, f] |= fresh
    if penalise_by_time:
        reward[reward == 0] = -0.01
    obs = []
    for i in range(agents):
        parts = [pos[:, i], vel[:, i]]
        for f in range(foods):
            parts += [food[:, f] - pos[:, i], eaten_now[:, f, None]]
        obs.append(np.concatenate(parts, -1))
    return pos, vel, eaten_now, reward, np.stack(obs, 1)


def navigation(pos, vel, goal, force, shared_reward, collisions, observe_all_goals):
    """One step. pos, vel, goal, force [E, N, 2] -> (pos, vel, reward, done, obs, sure); rays that graze a circle have
    `sure` False in the observation's place: there a rounding error decides."""
    episodes, agents, _ = pos.shape
    before = np.linalg.norm(pos - goal, axis=-1)
    vel = vel * 0.75
    for _ in range(2):
        total = force.copy()
        if collisions:
            for i in range(agents):
                for j in range(agents):
                    if i != j:
                        delta = pos[:, i] - pos[:, j]
                        dist = np.linalg.norm(delta, axis=-1, keepdims=True)
                        push = 100 * delta / dist * 1e-3 * np.logaddexp(0.0, (0.2 - dist) / 1e-3)
                        total[:, i] += np.where(dist <= 0.2, push, 0.0)
        vel = vel + 0.05 * total
        pos = pos + 0.05 * vel
    now = np.linalg.norm(pos - goal, axis=-1)
    reward = before - now
    if shared_reward:
        reward = np.repeat(reward.sum(1, keepdims=True), agents, axis=1)
    reward = reward + 0.01 * (now < 0.05).all(1, keepdims=True)
    if collisions:
        for i in range(agents):
            for j in range(agents):
                if i != j:
                    reward[:, i] -= np.linalg.norm(pos[:, i] - pos[:, j], axis=-1) - 0.2 <= 0.005
    obs, sure = [], []
    for i in range(agents):
        seen = range(agents) if observe_all_goals else [i]
        parts = [pos[:, i], vel[:, i], *[pos[:, i] - goal[:, g] for g in seen]]
        known = [np.ones((episodes, 4 + 2 * len(seen)), bool)]
        if collisions:
            dist, ok = lidar(pos, i)
            parts.append(0.35 - dist)
            known.append(ok)
        obs.append(np.concatenate(parts, -1))
        sure.append(np.concatenate(known, -1))
    return pos, vel, reward, (now < 0.1).all(1), np.stack(obs, 1), np.stack(sure, 1)


def lidar(pos: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest root t >= 0 of |p + t u - c| = 0.1 over the other agents, at most 0.35 [E, 12]; where it is sure."""
    best = np.full((len(pos), 12), 0.35)
    sure = np.ones((len(pos), 12), bool)
    for ray in range(12):
        u = np.array([math.cos(2 * math.pi * ray / 12), math.sin(2 * math.pi * ray / 12)])
        for j in range(pos.shape[1]):
            if j == i:
                continue
            w = pos[:, j] - pos[:, i]
            b, c = w @ u, (w**2).sum(-1) - 0.01
            square = b**2 - c  # discriminant of t^2 - 2 b t + c = 0
            root = np.maximum(b - np.sqrt(np.maximum(square, 0.0)), 0.0)
            best[:, ray] = np.where((square >= 0) & (b >= 0), np.minimum(best[:, ray], root), best[:, ray])
            sure[:, ray] &= (np.abs(square) > 1e-5) & ((np.abs(b) > 1e-5) | (square < 0))
    return best, sure


def spread(pos, vel, landmarks, group_of, action):
    """One step of blind particle spread. pos, vel [E, N, 2]; landmarks [E, G, 2]; action [E, N] -> (pos, vel, reward,
    obs without reordering)."""
    force = np.array([[0, 0], [-5, 0], [5, 0], [0, -5], [0, 5]])
    old = vel.copy()
    vel = 0.75 * vel + 0.1 * force[action]
    pos = pos + 0.1 * old
    reward = np.zeros(pos.shape[:2])
    obs = []
    for i, g in enumerate(group_of):
        reward[:, i] = -np.linalg.norm(pos[:, i] - landmarks[:, g], axis=-1)
        rel = [landmarks[:, k] - pos[:, i] for k in range(landmarks.shape[1])]
        obs.append(np.concatenate([vel[:, i], pos[:, i], *rel], -1))
    return pos, vel, reward, np.stack(obs, 1)


def hidden_corner(pos, corner, turned, action, size):
    """One step. pos [E, 2, 2] cells (row, column), corner [E, 2] 0 or 1, turned [E] bool, action [E, 2] -> (cells
    before agents that met are put elsewhere, reward [E])."""
    compass = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    clockwise = {1: 4, 4: 2, 2: 3, 3: 1, 0: 0}
    after, reward = pos.copy(), np.zeros(len(pos))
    for e in range(len(pos)):
        for i in range(2):
            a = int(action[e, i])
            row, column = compass[clockwise[a] if turned[e] else a]
            cell = pos[e, i, 0] + row, pos[e, i, 1] + column
            if 0 <= cell[0] < size and 0 <= cell[1] < size:
                after[e, i] = cell
        wanted = [0 if c == 0 else size - 1 for c in corner[e]]
        reward[e] = all(after[e, i].tolist() == wanted for i in range(2))
    return after, reward

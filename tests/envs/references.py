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


def lbf(pos, level, food, food_level, spawned, size, action, penalty, sight):
    """One step of one episode, everything on a grid. pos [N, 2], level [N], food [F, 2], food_level [F], size (rows,
    columns), action [N] -> (pos, food_level, reward [N], obs [N, 3 * (2 sight + 1)^2])."""
    rows, columns = size
    field = np.zeros((rows, columns), int)
    for cell, n in zip(food, food_level):
        if n > 0:
            field[tuple(cell)] = n
    step = {0: (0, 0), 1: (-1, 0), 2: (1, 0), 3: (0, -1), 4: (0, 1), 5: (0, 0)}
    cells = [tuple(p) for p in pos.tolist()]
    wish = []
    for cell, a in zip(cells, action.tolist()):
        new = cell[0] + step[a][0], cell[1] + step[a][1]
        legal = 0 <= new[0] < rows and 0 <= new[1] < columns and field[new] == 0
        wish.append(new if legal else cell)
    while True:  # those who stop keep their cell, which may stop others
        stopped = [i for i, w in enumerate(wish) if w != cells[i] and wish.count(w) > 1]
        if not stopped:
            break
        for i in stopped:
            wish[i] = cells[i]
    reward = np.zeros(len(cells))
    loaders = [i for i, a in enumerate(action.tolist()) if a == 5]
    for row, column in np.argwhere(field > 0):
        team = [i for i in loaders if abs(wish[i][0] - row) + abs(wish[i][1] - column) == 1]
        strength = sum(level[i] for i in team)
        if team and strength >= field[row, column]:
            for i in team:
                reward[i] += level[i] * field[row, column] / (strength * spawned)
            field[row, column] = 0
        elif team:
            reward[team] -= penalty
    layers = np.zeros((3, rows + 2 * sight, columns + 2 * sight))
    layers[1, sight : sight + rows, sight : sight + columns] = field
    layers[2, sight : sight + rows, sight : sight + columns] = field == 0
    for (row, column), n in zip(wish, level):
        layers[0, row + sight, column + sight] = n
        layers[2, row + sight, column + sight] = 0
    obs = [layers[:, r : r + 2 * sight + 1, c : c + 2 * sight + 1].ravel() for r, c in wish]
    left = [field[tuple(cell)] if n > 0 else 0 for cell, n in zip(food, food_level)]
    return np.array(wish), np.array(left), reward, np.stack(obs)


def boulder_push(pos, boulder, direction, side, action, order, penalty, incentive, sight):
    """One step of one episode on a grid; agents move in `order`. pos [N, 2], boulder [2] -> (pos, boulder, reward [N],
    done, obs [N, 4 + 2 * (2 sight + 1)^2])."""
    count = len(pos)
    step = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])
    line = np.array([(0, 1), (0, 1), (1, 0), (1, 0)])[direction]
    rock = {tuple(boulder + k * line) for k in range(count)}
    pos, reward, done = pos.copy(), np.zeros(count), False
    standing = {tuple(p) for p in pos.tolist()}
    if standing == {tuple(np.array(c) - step[direction]) for c in rock} and all(a == direction for a in action):
        boulder, pos = boulder + step[direction], pos + step[direction]
        rock = {tuple(boulder + k * line) for k in range(count)}
        goal = {0: 0, 1: side - 1, 2: 0, 3: side - 1}[direction]
        done = all(c[direction // 2] == goal for c in rock)
        reward += incentive + done
    else:
        for i in order:
            new = tuple((pos[i] + step[action[i]]).tolist())
            if not (0 <= new[0] < side and 0 <= new[1] < side) or new in {tuple(p) for p in pos.tolist()}:
                continue
            if new in rock:
                reward[i] -= penalty
            else:
                pos[i] = new
    layers = np.zeros((2, side + 2 * sight, side + 2 * sight))
    for k, cells in enumerate((pos.tolist(), rock)):
        for row, column in cells:
            layers[k, row + sight, column + sight] = 1
    views = [layers[:, r : r + 2 * sight + 1, c : c + 2 * sight + 1].ravel() for r, c in pos]
    obs = np.stack([np.concatenate([np.eye(4)[direction], v]) for v in views])
    return pos, boulder, reward, done, obs


def zone_spread(pos, vel, landmarks, action, penalty):
    """One step. pos, vel, landmarks [E, N, 2]; action [E, N]; penalty [E] -> (pos, vel, reward, obs)."""
    count = pos.shape[1]
    force = np.array([[0.0, 0], [-5, 0], [5, 0], [0, -5], [0, 5]])[action]
    for i in range(count):
        for j in range(count):
            if i != j:
                delta = pos[:, i] - pos[:, j]
                dist = np.linalg.norm(delta, axis=-1, keepdims=True)
                force[:, i] += 100 * delta / dist * 1e-3 * np.logaddexp(0.0, (0.3 - dist) / 1e-3)
    pos, vel = pos + 0.1 * vel, 0.75 * vel + 0.1 * force
    far = sum(
        np.min([np.linalg.norm(pos[:, i] - landmarks[:, k], axis=-1) for i in range(count)], 0) for k in range(count)
    )
    reward, obs = [], []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        hits = sum((np.linalg.norm(pos[:, i] - pos[:, j], axis=-1) < 0.3).astype(float) for j in others)
        reward.append(-0.5 * penalty * hits - 0.5 * far)
        seen = [landmarks[:, k] for k in range(count)] + [pos[:, j] for j in others]
        obs.append(np.concatenate([vel[:, i], pos[:, i], *[x - pos[:, i] for x in seen]], -1))
    return pos, vel, np.stack(reward, 1), np.stack(obs, 1)


def rware_moves(cells: list[tuple], want: list[tuple]) -> list[bool]:
    """Which robots get from their cells to those they want: each asks the one in its way."""
    robots = range(len(cells))
    goes = [w != c for w, c in zip(want, cells)]
    ahead = {i: cells.index(want[i]) for i in robots if goes[i] and want[i] in cells}

    def ring(i):
        seen = [i]
        while (j := ahead.get(seen[-1])) is not None and j not in seen:
            seen.append(j)
        return len(seen) if j == i else 0

    def first(i):
        rivals = sorted((j for j in robots if goes[j] and want[j] == want[i]), key=lambda j: (ring(j) < 3, j))
        return rivals[0] == i

    def moves(i, asked=()):
        if not goes[i] or not first(i) or ring(i) == 2:
            return False
        return i not in ahead or ahead[i] in asked or moves(ahead[i], (*asked, i))

    return [moves(i) for i in robots]


def rware(pos, direction, load, standing, requests, shelves, size, goals, action, sight):
    """One step of one episode, as far as nothing is random. pos [N, 2], standing and shelves [H, W], requests [Q],
    goals [G, 2] -> (pos, direction, load, standing, places in `requests` that are drawn anew, reward [N], a function of
    the new requests that gives the obs [N, 5 * (2 sight + 1)^2 + 6])."""
    rows, columns = size
    compass = ["up", "right", "down", "left"]
    code = {"up": 0, "down": 1, "left": 2, "right": 3}
    name = {n: d for d, n in code.items()}
    ahead = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    cells = [tuple(p) for p in pos.tolist()]
    faces, load, standing = [name[d] for d in direction.tolist()], load.copy(), standing.copy()
    want = []
    for cell, face, carried, a in zip(cells, faces, load, action.tolist()):
        new = cell[0] + ahead[face][0], cell[1] + ahead[face][1]
        legal = a == 1 and 0 <= new[0] < rows and 0 <= new[1] < columns
        want.append(new if legal and not (carried and standing[new]) else cell)
    cells = [w if ok else c for c, w, ok in zip(cells, want, rware_moves(cells, want))]
    for i, a in enumerate(action.tolist()):
        if a in (2, 3):
            faces[i] = compass[(compass.index(faces[i]) + (1 if a == 3 else -1)) % 4]
        elif a == 4 and not load[i]:
            load[i], standing[cells[i]] = standing[cells[i]], 0
        elif a == 4 and shelves[cells[i]]:
            standing[cells[i]], load[i] = load[i], 0
    reward, drawn = np.zeros(len(cells)), []
    for goal in goals.tolist():
        for i, cell in enumerate(cells):
            if cell == tuple(goal) and load[i] in requests:
                reward[i] += 1
                drawn.append(requests.tolist().index(load[i]))

    def look(requests):
        layers = np.zeros((5, rows, columns))
        layers[0], layers[1] = standing[:rows, :columns] > 0, np.isin(standing[:rows, :columns], requests)
        layers[4] = 1
        for cell, carried in zip(cells, load):
            layers[0][cell] = max(layers[0][cell], carried > 0)
            layers[1][cell] = max(layers[1][cell], carried in requests)
            layers[2][cell], layers[4][cell] = 1, 0
        for row, column in goals.tolist():
            if row >= 0:
                layers[3, row, column] = 1
        layers = np.pad(layers, ((0, 0), (sight, sight), (sight, sight)))
        obs = []
        for (row, column), face, carried in zip(cells, faces, load):
            view = layers[:, row : row + 2 * sight + 1, column : column + 2 * sight + 1]
            view = np.rot90(view, {"up": 0, "right": 1, "down": 2, "left": 3}[face], (1, 2))
            own = [shelves[row, column] == 0, carried > 0]
            obs.append(np.concatenate([view.ravel(), np.eye(4)[code[face]], own]))
        return np.stack(obs)

    return np.array(cells), np.array([code[f] for f in faces]), load, standing, drawn, reward, look

//! Addresses under every interleaving: agents, two servers that are behind each other, requests that come twice or late,
//! answers that are lost, restarts, hosts that are cut off, removed and joined anew. What decides is the real code: the
//! server's [`crate::ipam`] and what its transactions compare, its view for hosts, the agent's choice of addresses. What
//! carries it (store, network, ledger) is a model of a few lines.
//!
//! Held at each step: nobody has an address that somebody else has; whoever has one has the right to it; a block is leased
//! only when nobody's routes lead to its former holder any more. Held at the end, when all has come to rest: nothing is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use agent::ipam::Pool;
use ipnet::IpNet;
use model::api::{ApiError, ErrorCode};
use model::{
    Block, Catalog, Claim, EndpointId, EnvironmentId, Host, HostId, Key, Network, NetworkId, NetworkSpec,
    Object, Retained, Revision,
};

use crate::ipam::{self, Grant};
use crate::keys::{Keys, put};
use crate::state::{Environment, State};
use crate::store::{Batch, Compare, Event, KeyValue, Op, Txn};
use crate::view::{Cursor, Step};

const AGENTS: usize = 5;
const STEPS: usize = 100_000;
/// How old a request may become, in milliseconds: less than an address rests.
const DEADLINE: i64 = 30_000;

#[test]
fn no_address_is_given_twice_and_none_is_lost_at_any_interleaving() {
    let seed = std::env::var("SOAK_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_121);
    println!("SOAK_SEED={seed}");
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
        world.check();
    }
    world.rest();
    println!("{:?}", world.done);
    for what in [
        "attached",
        "single",
        "claimed",
        "consented",
        "refused to consent",
        "re-leased",
        "leased another's",
        "retained",
        "moved",
        "refused to move",
    ] {
        assert!(world.done.get(what).is_some_and(|times| *times > 20), "{what} too rarely: {:?}", world.done);
    }
}

/// The store of a few lines: keys, revisions, compares.
#[derive(Default)]
struct Store {
    keys: BTreeMap<String, KeyValue>,
    log: Vec<Batch>,
}

impl Store {
    fn revision(&self) -> Revision {
        Revision(self.log.len() as u64)
    }

    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::Absent(key) => !self.keys.contains_key(key),
            Compare::Present(key) => self.keys.contains_key(key),
            Compare::Value(key, value) => self.keys.get(key).is_some_and(|kv| kv.value == *value),
            Compare::Created(key, at) => self.keys.get(key).is_some_and(|kv| kv.created == *at),
            Compare::Modified(key, at) => self.keys.get(key).is_some_and(|kv| kv.modified == *at),
            Compare::NonePutSince(prefix, at) => {
                let below = self.keys.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(prefix));
                below.into_iter().all(|(_, kv)| kv.modified <= *at)
            }
        }
    }

    fn commit(&mut self, txn: Txn) -> bool {
        if !txn.compares.iter().all(|compare| self.holds(compare)) {
            return false;
        }
        if txn.success.is_empty() {
            return true;
        }
        let revision = Revision(self.log.len() as u64 + 1);
        let mut events = Vec::new();
        for op in txn.success {
            match op {
                Op::Put(key, value) => {
                    let old = self.keys.get(&key);
                    let created = old.map_or(revision, |kv| kv.created);
                    let version = old.map_or(0, |kv| kv.version) + 1;
                    let kv = KeyValue { key: key.clone(), value, created, modified: revision, version };
                    self.keys.insert(key, kv.clone());
                    events.push(Event::Put(kv));
                }
                Op::Delete(key) => {
                    if self.keys.remove(&key).is_some() {
                        events.push(Event::Delete(key));
                    }
                }
                Op::DeletePrefix(_) => panic!("no network is removed here"),
            }
        }
        self.log.push(Batch { revision, events });
        true
    }
}

/// What an agent asks for.
#[derive(Clone, Debug)]
enum Ask {
    Lease {
        held: usize,
    },
    Claim {
        address: Option<IpAddr>,
        endpoint: EndpointId,
        router: bool,
    },
    GiveBack(Block),
    Release(Claim),
    Heard(Revision),
    Consent {
        claim: Claim,
        consents: bool,
    },
    /// The address that is retained for somebody, or a new one.
    Retained {
        owner: String,
        endpoint: EndpointId,
    },
    /// What a server does that has waited long enough for a retained address.
    NoMore(Claim),
}

#[derive(Clone, Debug)]
struct Letter {
    agent: usize,
    host: HostId,
    life: u32,
    sent: i64,
    ask: Ask,
}

struct Agent {
    host: HostId,
    /// Grows with each start: an answer to an earlier one is for nobody.
    life: u32,
    /// The ledger: what it knows of the server's state, what is in use, what rests.
    catalog: Catalog,
    revision: Revision,
    used: BTreeMap<IpAddr, EndpointId>,
    released: BTreeMap<(NetworkId, IpAddr), i64>,
    leaving: BTreeMap<Key, Object>,
    cursor: Option<(usize, Cursor)>,
    /// Routes as the kernel has them: to whom each block leads.
    routes: BTreeMap<IpNet, HostId>,
    applied: Revision,
    cut: bool,
}

struct World {
    random: u64,
    now: i64,
    environment: EnvironmentId,
    network: Network,
    store: Store,
    servers: [State; 2],
    agents: Vec<Agent>,
    post: Vec<Letter>,
    hosts: u32,
    ids: u64,
    done: BTreeMap<&'static str, u32>,
    /// Nothing is retained any more.
    ending: bool,
    /// [`World::grants`], as last looked at.
    granted: (Revision, Vec<Block>, BTreeMap<IpAddr, Claim>),
}

impl World {
    fn new(seed: u64) -> Self {
        let mut spec = NetworkSpec::new("small".parse().unwrap(), "10.50.0.0/24".parse().unwrap());
        spec.block_prefix = Some(28);
        let network = spec.validate(NetworkId::from_random([1; 8]), 1, 0).unwrap();
        let environment = EnvironmentId::default();
        let mut world = Self {
            random: seed.max(1),
            now: 0,
            network,
            store: Store::default(),
            servers: [State::default(), State::default()],
            agents: Vec::new(),
            post: Vec::new(),
            hosts: 0,
            ids: 0,
            done: BTreeMap::new(),
            ending: false,
            granted: Default::default(),
            environment,
        };
        let keys = Keys(&world.environment);
        let ops = vec![
            Op::Put(keys.environment(), b"{}".to_vec()),
            put(keys.network(&world.network.id), &world.network).unwrap(),
        ];
        assert!(world.store.commit(Txn::new(vec![], ops)));
        for _ in 0..AGENTS {
            let agent = world.join();
            world.agents.push(agent);
        }
        world
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random >> 33).unwrap() % bound
    }

    fn did(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    fn join(&mut self) -> Agent {
        self.hosts += 1;
        let mut random = [0; 8];
        random[..4].copy_from_slice(&self.hosts.to_be_bytes());
        let id = HostId::from_random(random);
        let name = format!("h{}", self.hosts).parse().unwrap();
        let key = format!("key {}", self.hosts);
        let host = Host { id: id.clone(), name, candidates: vec![], labels: BTreeMap::new(), key, joined: 0 };
        let op = put(Keys(&self.environment).host(&id), &host).unwrap();
        assert!(self.store.commit(Txn::new(vec![], vec![op])));
        Agent {
            host: id,
            life: 0,
            catalog: Catalog::default(),
            revision: Revision::default(),
            used: BTreeMap::new(),
            released: BTreeMap::new(),
            leaving: BTreeMap::new(),
            cursor: None,
            routes: BTreeMap::new(),
            applied: Revision::default(),
            cut: false,
        }
    }

    fn step(&mut self) {
        let agent = self.below(AGENTS);
        match self.below(1000) {
            0..170 => self.attach(agent),
            170..320 => self.detach(agent),
            320..350 => self.wish(agent),
            350..380 => self.attach_retained(agent),
            380..580 => self.deliver(),
            580..710 => self.follow(agent),
            710..785 => self.converge(agent),
            785..820 => self.say_heard(agent),
            820..860 => self.consent(agent),
            860..900 => self.tidy(agent),
            900..960 => {
                let server = self.below(2);
                self.catch_up(server, false);
            }
            960..975 => self.restart_agent(agent),
            975..980 => self.restart_server(),
            980..992 => self.agents[agent].cut = !self.agents[agent].cut,
            992..994 => self.remove_and_join(agent),
            _ => self.now += 20_000,
        }
        self.now += 100;
    }

    // ---- agents ----

    fn blocks(&self, agent: &Agent) -> Vec<IpNet> {
        let kept = |block: &&Block| {
            block.host == agent.host
                && !agent.leaving.contains_key(&Key::Block(block.network.clone(), block.cidr))
        };
        agent.catalog.blocks_of(&self.network.id).filter(kept).map(|block| block.cidr).collect()
    }

    fn has_claim(&self, agent: &Agent, address: IpAddr) -> bool {
        let name = (self.network.id.clone(), address);
        agent.catalog.claims.get(&name).is_some_and(|claim| claim.host == agent.host && !claim.asked)
            && !agent.leaving.contains_key(&Key::Claim(name.0, address))
    }

    fn attach(&mut self, index: usize) {
        let agent = &self.agents[index];
        let blocks = self.blocks(agent);
        let router = agent.catalog.router_address(&self.network.id, &agent.host);
        let router =
            router.filter(|it| blocks.iter().any(|block| block.contains(it)) || self.has_claim(agent, *it));
        let (host, life) = (agent.host.clone(), agent.life);
        let used: BTreeSet<IpAddr> = agent.used.keys().copied().collect();
        let picked = router.and_then(|router| {
            let pool = Pool {
                network: &self.network.id,
                geometry: self.network.geometry(),
                blocks: &blocks,
                router: Some(router),
                used: &used,
                claims: &agent.catalog.claims,
                released: &agent.released,
            };
            let idle = |claim: &&Claim| {
                claim.host == agent.host
                    && !claim.router
                    && claim.retained.is_none()
                    && !used.contains(&claim.address)
                    && self.has_claim(agent, claim.address)
            };
            pool.pick(self.now)
                .or_else(|| agent.catalog.claims_of(&self.network.id).find(idle).map(|claim| claim.address))
        });
        match picked {
            Some(address) => self.take(index, address),
            None => {
                self.send_back(index);
                let ask = Ask::Lease { held: blocks.len() };
                self.post.push(Letter { agent: index, host, life, sent: self.now, ask });
            }
        }
    }

    /// One of a few containers that keep their addresses begins, here or there.
    fn attach_retained(&mut self, index: usize) {
        let owner = format!("c{}", self.below(3));
        let agent = &self.agents[index];
        if self.blocks(agent).is_empty() {
            return;
        }
        let of_owner = |claim: &&Claim| claim.retained.as_ref().is_some_and(|it| it.owner == owner);
        let claim = agent.catalog.claims_of(&self.network.id).find(of_owner).cloned();
        match claim {
            Some(claim) if agent.used.contains_key(&claim.address) => {}
            Some(claim) if self.has_claim(agent, claim.address) => {
                self.take(index, claim.address);
                self.did("retained");
            }
            Some(_) | None => {
                let (host, life) = (agent.host.clone(), agent.life);
                self.ids += 1;
                let endpoint = EndpointId::from_random(self.ids.to_be_bytes());
                let ask = Ask::Retained { owner, endpoint };
                self.post.push(Letter { agent: index, host, life, sent: self.now, ask });
            }
        }
    }

    fn take(&mut self, index: usize, address: IpAddr) {
        self.ids += 1;
        let id = EndpointId::from_random(self.ids.to_be_bytes());
        let agent = &mut self.agents[index];
        assert!(agent.used.insert(address, id).is_none());
        let mut others = self.agents.iter().enumerate().filter(|(other, _)| *other != index);
        assert!(!others.any(|(_, other)| other.used.contains_key(&address)), "{address} is given twice");
        self.did("attached");
    }

    fn detach(&mut self, index: usize) {
        let count = self.agents[index].used.len();
        if count == 0 {
            return;
        }
        let which = self.below(count);
        let agent = &mut self.agents[index];
        let Some(address) = agent.used.keys().nth(which).copied() else { return };
        agent.used.remove(&address);
        agent.released.insert((self.network.id.clone(), address), self.now);
    }

    /// Asks for one certain address, anywhere in the pool.
    fn wish(&mut self, index: usize) {
        let address: IpAddr = format!("10.50.0.{}", self.below(256)).parse().unwrap();
        let agent = &self.agents[index];
        let used = agent.used.contains_key(&address);
        if self.blocks(agent).is_empty() || used {
            return;
        }
        if self.has_claim(agent, address)
            && agent.catalog.router_address(&self.network.id, &agent.host) != Some(address)
        {
            return self.take(index, address);
        }
        self.ids += 1;
        let endpoint = EndpointId::from_random(self.ids.to_be_bytes());
        let ask = Ask::Claim { address: Some(address), endpoint, router: false };
        let letter = Letter { agent: index, host: agent.host.clone(), life: agent.life, sent: self.now, ask };
        self.post.push(letter);
    }

    /// Takes in what the watch says; opens it anew where it was lost.
    fn follow(&mut self, index: usize) {
        if self.agents[index].cut {
            self.agents[index].cursor = None;
            return;
        }
        let server = match &self.agents[index].cursor {
            Some((server, _)) => *server,
            None => self.below(2),
        };
        self.catch_up(server, false);
        let (state, agent) = (&self.servers[server], &mut self.agents[index]);
        if agent.cursor.is_none() {
            // A server that is behind what the agent has seen would take back what it knows.
            if state.revision < agent.revision {
                return;
            }
            let Some(cursor) = Cursor::new(state, &self.environment, &agent.host) else { return };
            let objects = cursor.snapshot(state);
            agent.catalog = Catalog::from_objects(objects);
            agent.revision = state.revision;
            agent.cursor = Some((server, cursor));
        } else if let Some((_, cursor)) = &mut agent.cursor {
            match cursor.advance(state) {
                Step::Nothing => agent.revision = cursor.at,
                Step::Delta(touched) => {
                    agent.revision = cursor.at;
                    for change in cursor.changes(state, &touched) {
                        match &change {
                            model::Change::Delete(Key::Claim(network, address)) => {
                                agent.released.insert((network.clone(), *address), self.now);
                            }
                            model::Change::Delete(_) | model::Change::Put(_) => {}
                        }
                        agent.catalog.apply(change);
                    }
                }
                Step::Gone | Step::Lost => agent.cursor = None,
            }
        }
        let catalog = &agent.catalog;
        agent.leaving.retain(|key, object| object.is_on_its_way(catalog.get(key).as_ref()));
    }

    fn converge(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        let blocks = agent.catalog.blocks_of(&self.network.id);
        agent.routes = blocks.map(|block| (block.cidr, block.host.clone())).collect();
        agent.applied = agent.revision;
    }

    fn say_heard(&mut self, index: usize) {
        let agent = &self.agents[index];
        if agent.cut {
            return;
        }
        let (host, life, ask) = (agent.host.clone(), agent.life, Ask::Heard(agent.applied));
        self.post.push(Letter { agent: index, host, life, sent: self.now, ask });
    }

    fn consent(&mut self, index: usize) {
        let agent = &self.agents[index];
        let blocks: Vec<IpNet> = agent
            .catalog
            .blocks_of(&self.network.id)
            .filter(|block| block.host == agent.host)
            .map(|block| block.cidr)
            .collect();
        let asked = agent.catalog.claims.values().find(|claim| {
            if claim.host == agent.host {
                return claim.wanted.is_some();
            }
            claim.asked
                && claim.host != agent.host
                && blocks.iter().any(|block| block.contains(&claim.address))
        });
        let Some(claim) = asked.cloned() else { return };
        let router = agent.catalog.router_address(&self.network.id, &agent.host);
        let consents = !agent.used.contains_key(&claim.address) && router != Some(claim.address);
        let moves = claim.wanted.is_some();
        if consents && moves {
            let object = Object::Claim(claim.clone());
            // What is on its way back to the server already stays so.
            self.agents[index].leaving.entry(object.key()).or_insert(object);
        }
        let agent = &self.agents[index];
        let ask = Ask::Consent { claim, consents };
        self.post.push(Letter {
            agent: index,
            host: agent.host.clone(),
            life: agent.life,
            sent: self.now,
            ask,
        });
        self.did(match (moves, consents) {
            (false, true) => "consented",
            (false, false) => "refused to consent",
            (true, true) => "moved",
            (true, false) => "refused to move",
        });
    }

    /// Gives back what is not needed.
    fn tidy(&mut self, index: usize) {
        let over = self.ending || self.below(4) == 0;
        let agent = &self.agents[index];
        let router = agent.catalog.router_address(&self.network.id, &agent.host);
        let free = |claim: &&Claim| {
            claim.host == agent.host
                && claim.wanted.is_none()
                && (over || claim.retained.is_none())
                && !agent.used.contains_key(&claim.address)
                && (Some(claim.address) != router || agent.used.is_empty())
        };
        let claim = agent.catalog.claims.values().find(free).cloned().map(Object::Claim);
        let empty = |block: &&Block| {
            let inside = |address: &IpAddr| block.cidr.contains(address);
            let used = agent.used.keys().any(inside);
            let claimed = agent.catalog.claims.values().any(|claim| inside(&claim.address));
            let holds_router = router.as_ref().is_some_and(inside);
            block.host == agent.host && (agent.used.is_empty() || (!used && !claimed && !holds_router))
        };
        let block = agent.catalog.blocks_of(&self.network.id).find(empty).cloned().map(Object::Block);
        if let Some(object) = claim.or(block) {
            self.agents[index].leaving.insert(object.key(), object);
        }
        self.send_back(index);
    }

    /// Asks for what is on its way back to be taken.
    fn send_back(&mut self, index: usize) {
        let agent = &self.agents[index];
        for object in agent.leaving.values() {
            let ask = match object {
                Object::Block(block) => Ask::GiveBack(block.clone()),
                Object::Claim(claim) if claim.wanted.is_none() => Ask::Release(claim.clone()),
                _ => continue,
            };
            self.post.push(Letter {
                agent: index,
                host: agent.host.clone(),
                life: agent.life,
                sent: self.now,
                ask,
            });
        }
    }

    fn restart_agent(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        agent.life += 1;
        agent.cursor = None;
    }

    fn remove_and_join(&mut self, index: usize) {
        // Its containers end with it.
        let old = self.agents[index].host.clone();
        self.catch_up(0, true);
        let keys = Keys(&self.environment);
        let state = &self.servers[0];
        let env = &state.environments[&self.environment];
        let mut ops = vec![Op::Delete(keys.host(&old))];
        for block in env.catalog.blocks.values().filter(|block| block.host == old) {
            ops.extend(ipam::withdraw(keys, env, block, true).unwrap().1);
        }
        let claims = env.catalog.claims.values().filter(|claim| claim.host == old);
        ops.extend(claims.map(|claim| Op::Delete(keys.claim(&claim.network, &claim.address))));
        ops.extend(ipam::heard(keys, env, &old, state.revision).unwrap().unwrap_or_default().success);
        assert!(self.store.commit(Txn::new(vec![], ops)));
        let new = self.join();
        self.agents[index] = Agent { life: self.agents[index].life + 1, ..new };
    }

    // ---- servers ----

    fn catch_up(&mut self, server: usize, wholly: bool) {
        let behind = self.store.log.len() - usize::try_from(self.servers[server].revision.0).unwrap();
        let count = if wholly || behind == 0 { behind } else { 1 + self.below(behind) };
        for _ in 0..count {
            let next = usize::try_from(self.servers[server].revision.0).unwrap();
            self.servers[server].apply(&self.store.log[next]);
        }
    }

    fn restart_server(&mut self) {
        let server = self.below(2);
        // It reads all that there is, as it is.
        let events = self.store.keys.values().cloned().map(Event::Put).collect();
        let mut state = State::default();
        state.apply(&Batch { revision: self.store.revision(), events });
        self.servers[server] = state;
        for agent in &mut self.agents {
            if agent.cursor.as_ref().is_some_and(|(of, _)| *of == server) {
                agent.cursor = None;
            }
        }
    }

    /// Delivers a letter, perhaps for the first of two times; its answer may be lost.
    fn deliver(&mut self) {
        // A request has a deadline on both sides: what is older is served by nobody.
        let now = self.now;
        self.post.retain(|letter| now - letter.sent <= DEADLINE);
        if self.post.is_empty() {
            return;
        }
        let which = self.below(self.post.len());
        if self.agents[self.post[which].agent].cut {
            return;
        }
        let letter =
            if self.below(10) == 0 { self.post[which].clone() } else { self.post.swap_remove(which) };
        let server = self.below(2);
        let answered = self.below(10) != 0;
        for attempt in 0..8 {
            if attempt > 0 {
                self.catch_up(server, true);
            }
            match self.serve(server, &letter) {
                Served::Again => {}
                Served::Answer(answer) => {
                    if let Answer::Asked(claim) = &answer {
                        // The server waits, and asks no more some time, whoever hears of it.
                        let ask = Ask::NoMore(claim.clone());
                        self.post.push(Letter { ask, sent: self.now, ..letter.clone() });
                    }
                    if answered {
                        self.answer(&letter, answer);
                    }
                    return;
                }
            }
        }
    }

    fn serve(&mut self, server: usize, letter: &Letter) -> Served {
        let state = &self.servers[server];
        let Some(env) = state.environments.get(&self.environment) else { return Served::Again };
        // A removed host's certificate is worth nothing; one that joined a moment ago is not known everywhere.
        if !env.catalog.hosts.contains_key(&letter.host) {
            return Served::Answer(Answer::Refused(ErrorCode::Unauthenticated));
        }
        let keys = Keys(&self.environment);
        let planned = plan(keys, env, state.revision, &self.network, letter);
        match planned {
            Err(error) => Served::Answer(Answer::Refused(error.code)),
            Ok((None, answer)) => Served::Answer(answer),
            Ok((Some(txn), answer)) => {
                let new_lease = match (&letter.ask, &answer) {
                    (Ask::Lease { .. }, Answer::Block(block)) if block.leased == Revision::default() => {
                        Some(block.cidr)
                    }
                    _ => None,
                };
                if !self.store.commit(txn) {
                    return Served::Again;
                }
                if let Some(cidr) = new_lease {
                    self.nobody_leads_elsewhere(cidr, &letter.host);
                }
                // The answer comes when the state in memory has the change, too.
                self.catch_up(server, true);
                Served::Answer(match answer {
                    Answer::Block(block) if new_lease.is_some() => {
                        Answer::Block(Block { leased: self.store.revision(), ..block })
                    }
                    other => other,
                })
            }
        }
    }

    /// A block that is leased now: nobody who was not removed sends to whoever held it before.
    fn nobody_leads_elsewhere(&mut self, cidr: IpNet, to: &HostId) {
        let mut before = false;
        for agent in &self.agents {
            match agent.routes.get(&cidr) {
                Some(host) if host != to => {
                    panic!("{cidr} is leased to {to}, and {} sends to {host}", agent.host)
                }
                Some(_) => before = true,
                None => {}
            }
        }
        self.did(if before { "re-leased" } else { "leased another's" });
    }

    fn answer(&mut self, letter: &Letter, answer: Answer) {
        let agent = &mut self.agents[letter.agent];
        if agent.life != letter.life || agent.host != letter.host {
            return;
        }
        match answer {
            Answer::Block(block) => {
                let object = Object::Block(block);
                if !agent.leaving.get(&object.key()).is_some_and(|left| left.is_same_grant(&object)) {
                    agent.leaving.remove(&object.key());
                    agent.catalog.put(object);
                }
            }
            Answer::Claim(claim) if !claim.asked => {
                let router = claim.router;
                let object = Object::Claim(claim);
                if !agent.leaving.get(&object.key()).is_some_and(|left| left.is_same_grant(&object)) {
                    agent.leaving.remove(&object.key());
                    agent.catalog.put(object);
                }
                self.did(if router { "single" } else { "claimed" });
            }
            Answer::Refused(ErrorCode::Exhausted) => {
                if let Ask::Lease { held } = letter.ask {
                    for router in [held == 0, false] {
                        self.ids += 1;
                        let endpoint = EndpointId::from_random(self.ids.to_be_bytes());
                        let ask = Ask::Claim { address: None, endpoint, router };
                        self.post.push(Letter { ask, ..letter.clone() });
                    }
                }
            }
            Answer::Claim(_) | Answer::Asked(_) | Answer::Refused(_) | Answer::Nothing => {}
        }
    }

    // ---- what must hold ----

    fn check(&mut self) {
        if self.granted.0 != self.store.revision() {
            self.granted = self.grants();
        }
        let (_, blocks, claims) = &self.granted;
        let mut seen: BTreeMap<IpAddr, &HostId> = BTreeMap::new();
        for agent in &self.agents {
            for address in agent.used.keys() {
                if let Some(other) = seen.insert(*address, &agent.host) {
                    panic!("{address} is on {other} and on {}", agent.host);
                }
                let right = match claims.get(address) {
                    Some(claim) => claim.host == agent.host,
                    None => blocks.iter().any(|it| it.host == agent.host && it.cidr.contains(address)),
                };
                assert!(right, "{address} is used on {} without right", agent.host);
            }
        }
    }

    /// All that the store grants to anybody.
    fn grants(&self) -> (Revision, Vec<Block>, BTreeMap<IpAddr, Claim>) {
        let all = |prefix: String| {
            let below = self.store.keys.range(prefix.clone()..);
            below.take_while(move |(key, _)| key.starts_with(&prefix)).map(|(_, kv)| &kv.value)
        };
        let keys = Keys(&self.environment);
        let blocks: Vec<Block> =
            all(keys.blocks(&self.network.id)).map(|value| serde_json::from_slice(value).unwrap()).collect();
        let claims: BTreeMap<IpAddr, Claim> = all(keys.claims(&self.network.id))
            .map(|value| serde_json::from_slice::<Claim>(value).unwrap())
            .filter(|claim| !claim.asked)
            .map(|claim| (claim.address, claim))
            .collect();
        (self.store.revision(), blocks, claims)
    }

    /// Everything ends, all is delivered and heard: nothing is held by anybody.
    fn rest(&mut self) {
        self.ending = true;
        for agent in &mut self.agents {
            agent.cut = false;
            agent.used.clear();
        }
        for _ in 0..200 {
            for server in 0..2 {
                self.catch_up(server, true);
            }
            for agent in 0..AGENTS {
                self.follow(agent);
                self.follow(agent);
                self.converge(agent);
                self.say_heard(agent);
                self.consent(agent);
                self.tidy(agent);
            }
            while !self.post.is_empty() {
                self.deliver();
            }
        }
        let left: Vec<&String> = self
            .store
            .keys
            .keys()
            .filter(|key| ["/blocks/", "/claims/", "/withdrawn/"].iter().any(|part| key.contains(part)))
            .collect();
        assert!(left.is_empty(), "lost: {left:?}");
    }
}

enum Served {
    Again,
    Answer(Answer),
}

enum Answer {
    Block(Block),
    Claim(Claim),
    Asked(Claim),
    Refused(ErrorCode),
    Nothing,
}

/// What the server's handlers do with a request.
fn plan(
    keys: Keys<'_>,
    env: &Environment,
    revision: Revision,
    network: &Network,
    letter: &Letter,
) -> Result<(Option<Txn>, Answer), ApiError> {
    let host = &letter.host;
    let nothing = |txn| (txn, Answer::Nothing);
    Ok(match &letter.ask {
        Ask::Lease { held } => match ipam::lease(keys, env, revision, network, host, *held)? {
            Grant::Held(txn, block) => (Some(txn), Answer::Block(block)),
            Grant::New(txn, block) => (Some(txn), Answer::Block(block)),
        },
        Ask::Claim { address, endpoint, router } => {
            let address = match address {
                Some(address) => *address,
                None => {
                    let held =
                        env.claims_of(&network.id).find(|it| it.endpoint == *endpoint && it.host == *host);
                    held.map_or_else(|| ipam::single(env, network), |claim| Ok(claim.address))?
                }
            };
            let wanted = Claim {
                network: network.id.clone(),
                address,
                host: host.clone(),
                endpoint: endpoint.clone(),
                asked: false,
                router: *router,
                retained: None,
                wanted: None,
            };
            match ipam::claim(keys, env, revision, network, &wanted)? {
                Grant::Held(txn, claim) => (Some(txn), Answer::Claim(claim)),
                Grant::New(txn, claim) => (Some(txn), Answer::Claim(claim)),
            }
        }
        Ask::GiveBack(block) => {
            nothing(ipam::give_back(keys, env, revision, network, host, block.cidr, Some(block.leased))?)
        }
        Ask::Release(claim) => {
            let (address, endpoint) = (claim.address, Some(&claim.endpoint));
            nothing(ipam::release(keys, env, revision, network, host, address, endpoint)?)
        }
        Ask::Heard(revision) => nothing(ipam::heard(keys, env, host, *revision)?),
        Ask::Retained { owner, endpoint } => match ipam::retained(env, network, owner) {
            Some(claim) => match ipam::move_retained(keys, env, revision, claim, (host, endpoint))? {
                Grant::Held(txn, claim) => (Some(txn), Answer::Claim(claim)),
                Grant::New(txn, claim) => (Some(txn), Answer::Asked(claim)),
            },
            None => {
                let wanted = Claim {
                    network: network.id.clone(),
                    address: ipam::unretained(env, network)?,
                    host: host.clone(),
                    endpoint: endpoint.clone(),
                    asked: false,
                    router: false,
                    retained: Some(Retained { owner: owner.clone(), seconds: 1 }),
                    wanted: None,
                };
                match ipam::claim(keys, env, revision, network, &wanted)? {
                    Grant::Held(txn, claim) | Grant::New(txn, claim) => (Some(txn), Answer::Claim(claim)),
                }
            }
        },
        Ask::NoMore(claim) => nothing(ipam::ask_no_more(keys, env, claim)?),
        Ask::Consent { claim, consents } if claim.wanted.is_some() => {
            let at = claim.wanted.as_ref().map_or_else(Revision::default, |wanted| wanted.at);
            nothing(ipam::consent_to_move(keys, env, network, host, claim.address, at, *consents)?)
        }
        Ask::Consent { claim, consents } => {
            let (address, endpoint) = (claim.address, &claim.endpoint);
            nothing(ipam::consent(keys, env, network, host, address, endpoint, *consents)?)
        }
    })
}

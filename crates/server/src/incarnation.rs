//! Which life of a host's ledger is the one that counts. Pure: it looks at what the store has and says what becomes of it.
//!
//! A machine that is copied, state directory and all, has the same key; so has one that was put back from an old backup.
//! Each start of an agent makes a new [`Incarnation`] of the one before, and the store has the last that was taken. Who comes
//! from another one than that is a copy, or old. Who comes from that one is believed, unless its holder shows that it lives:
//! then the holder steps on by itself, and what the other has is old from then on.
//!
//! Invariant: of all that have the same ledger one at most goes on.

use std::net::IpAddr;

use model::api::RefusedCopy;
use model::{Incarnation, Step, UnixMillis};
use serde::{Deserialize, Serialize};

/// What the store knows of a host's lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Life {
    /// The one that counts.
    pub(crate) current: Incarnation,
    /// Another came with it, and its holder is asked whether it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) contest: Option<Contest>,
    /// What was refused last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) copy: Option<RefusedCopy>,
}

/// A question to the holder of an incarnation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Contest {
    /// What the other would go on with.
    pub(crate) by: Incarnation,
    pub(crate) from: IpAddr,
    /// What the holder answers with. Nobody else is told.
    pub(crate) challenge: String,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on: this is to be stored.
    Take(Life),
    /// It goes on already.
    Taken,
    /// Its holder is to be asked.
    Contest,
    /// Its holder was asked, and has not answered yet.
    Wait,
    /// The store is older than the agent.
    Behind,
    /// What was asked of it is asked no more.
    Late,
    /// It is a copy, or old.
    Copy,
}

/// What becomes of a step. `alive` is whether the holder of the current incarnation may live; `asked` whether it was asked for
/// this step's sake; `restored` whether the store was restored and the host has not reported yet.
pub(crate) fn judge(known: Option<&Life>, step: &Step, alive: bool, asked: bool, restored: bool) -> Verdict {
    let fresh = |copy| Verdict::Take(Life { current: step.to.clone(), contest: None, copy });
    let Some(life) = known else { return fresh(None) };
    let holds = step.from.as_ref() == Some(&life.current);
    if let Some(proof) = &step.proof {
        return match &life.contest {
            Some(contest) if holds && contest.challenge == *proof => fresh(life.copy.clone()),
            _ if life.current == step.to => Verdict::Taken,
            _ if holds => Verdict::Late,
            Some(_) | None => Verdict::Copy,
        };
    }
    if life.current == step.to && step.from.as_ref() != Some(&step.to) {
        return Verdict::Taken;
    }
    if holds {
        return match &life.contest {
            _ if !alive => fresh(life.copy.clone()),
            Some(contest) if contest.by == step.to => Verdict::Wait,
            // Its holder has answered, or a third one came after it.
            Some(_) | None if asked => Verdict::Copy,
            Some(_) | None => Verdict::Contest,
        };
    }
    match &step.from {
        Some(from) if from.number > life.current.number => {
            if restored {
                fresh(life.copy.clone())
            } else {
                Verdict::Behind
            }
        }
        Some(_) | None => Verdict::Copy,
    }
}

/// That a copy was refused.
pub(crate) fn refused(life: &Life, from: IpAddr, at: UnixMillis) -> Life {
    let times = life.copy.as_ref().map_or(0, |copy| copy.times).saturating_add(1);
    Life { copy: Some(RefusedCopy { at, from, times }), ..life.clone() }
}

#[cfg(test)]
mod tests {
    use model::Lineage;

    use super::*;

    /// xorshift64 (Marsaglia 2003).
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) % bound
        }

        fn bytes(&mut self) -> [u8; 8] {
            self.below(1 << 50).to_be_bytes()
        }
    }

    /// A machine: its disk, and what its agent knows while that runs.
    #[derive(Clone, Default)]
    struct Machine {
        disk: Lineage,
        /// What this start of the agent made.
        made: Option<Incarnation>,
        /// What it goes by, once the server took that.
        current: Option<Incarnation>,
        refused: bool,
    }

    impl Machine {
        /// As the agent does it: what was made by an earlier start is settled first.
        fn begin(&mut self, random: &mut Random) -> (Step, bool) {
            let settled = self.disk.next.is_none();
            let step = self.disk.begin(random.bytes());
            if settled {
                self.made = Some(step.to.clone());
            }
            let ours = self.made.as_ref() == Some(&step.to);
            (step, ours)
        }

        fn taken(&mut self, step: &Step, ours: bool) {
            self.disk.taken(&step.to);
            if ours {
                self.current = Some(step.to.clone());
            }
        }

        fn die(&mut self) {
            (self.made, self.current) = (None, None);
        }
    }

    /// The machine `which` tries to come to the server, and may die at any point of it.
    fn come(machines: &mut [Machine], which: usize, store: &mut Option<Life>, random: &mut Random) {
        if machines[which].refused || machines[which].current.is_some() {
            return;
        }
        let (step, ours) = machines[which].begin(random);
        if random.below(4) == 0 {
            return machines[which].die();
        }
        let holder = store
            .as_ref()
            .and_then(|life| machines.iter().position(|it| it.current.as_ref() == Some(&life.current)));
        let verdict = judge(store.as_ref(), &step, holder.is_some(), false, false);
        let verdict = match (verdict, holder) {
            (Verdict::Contest, Some(holder)) => {
                let life = store.as_mut().unwrap();
                let challenge = random.below(1 << 50).to_string();
                let by = step.to.clone();
                life.contest = Some(Contest { by, from: [0; 4].into(), challenge: challenge.clone() });
                let (answer, ours) = machines[holder].begin(random);
                let answer = Step { proof: Some(challenge), ..answer };
                let Verdict::Take(life) = judge(store.as_ref(), &answer, true, false, false) else {
                    panic!()
                };
                *store = Some(life);
                machines[holder].taken(&answer, ours);
                judge(store.as_ref(), &step, true, true, false)
            }
            (verdict, _) => verdict,
        };
        match verdict {
            Verdict::Take(life) => *store = Some(life),
            Verdict::Taken => {}
            Verdict::Copy => {
                machines[which].refused = true;
                return;
            }
            other => panic!("{other:?}"),
        }
        // Its answer may be lost.
        if random.below(4) == 0 {
            return machines[which].die();
        }
        machines[which].taken(&step, ours);
    }

    fn lineage(number: u64, random: u8) -> Incarnation {
        format!("{number}-{random:016x}").parse().unwrap()
    }

    fn step(from: Option<Incarnation>, to: Incarnation) -> Step {
        Step { from, to, proof: None }
    }

    fn life(current: Incarnation) -> Life {
        Life { current, contest: None, copy: None }
    }

    #[test]
    fn one_that_dies_at_any_point_goes_on_and_of_its_copies_one_at_most() {
        let mut found = 0;
        for seed in 1..2_000 {
            let mut random = Random(seed);
            let mut store = None;
            let mut machines = vec![Machine::default()];
            for _ in 0..random.below(40) {
                come(&mut machines, 0, &mut store, &mut random);
                assert!(!machines[0].refused, "seed {seed}: alone, and refused");
                if random.below(5) == 0 {
                    machines[0].die();
                }
            }
            // Its disk is copied, at any moment, and all go on as they like.
            for _ in 0..=random.below(3) {
                let disk = machines[0].disk.clone();
                machines.push(Machine { disk, ..Machine::default() });
            }
            let lives = machines[0].current.is_some();
            for _ in 0..60 {
                let which = random.below(machines.len() as u64) as usize;
                come(&mut machines, which, &mut store, &mut random);
                let counts = store.as_ref().map(|life: &Life| life.current.clone());
                let on = machines.iter().filter(|it| it.current.is_some() && it.current == counts).count();
                assert!(on <= 1, "seed {seed}: two go on");
                assert!(machines.iter().filter(|it| !it.refused).count() >= 1, "seed {seed}: nobody goes on");
                assert!(!lives || !machines[0].refused, "seed {seed}: it lived all the while");
                if !lives && random.below(6) == 0 {
                    machines[which].die();
                }
            }
            found += machines.iter().filter(|it| it.refused).count();
        }
        assert!(found > 2_000, "copies are found out: {found}");
    }

    #[test]
    fn a_holder_that_lives_goes_on_and_the_copy_is_found_out_whenever_it_comes_again() {
        let (one, copys, holders) = (lineage(1, 1), lineage(2, 2), lineage(2, 3));
        let mut known = life(one.clone());
        let comes = step(Some(one.clone()), copys.clone());
        assert_eq!(judge(Some(&known), &comes, true, false, false), Verdict::Contest);
        let from = "10.0.0.9".parse().unwrap();
        known.contest = Some(Contest { by: copys, from, challenge: "c".into() });
        assert_eq!(judge(Some(&known), &comes, true, true, false), Verdict::Wait);
        let guess = Step { proof: Some("x".into()), ..comes.clone() };
        assert_eq!(judge(Some(&known), &guess, true, false, false), Verdict::Late);
        let proof = Some("c".to_owned());
        let answers = Step { from: Some(one.clone()), to: holders.clone(), proof: proof.clone() };
        let Verdict::Take(next) = judge(Some(&known), &answers, true, false, false) else { panic!() };
        assert_eq!(next.current, holders);
        // Its answer was lost, and is said again.
        assert_eq!(judge(Some(&next), &answers, true, false, false), Verdict::Taken);
        for alive in [false, true] {
            assert_eq!(judge(Some(&next), &comes, alive, true, false), Verdict::Copy);
            assert_eq!(judge(Some(&next), &comes, alive, false, false), Verdict::Copy);
        }
        // A holder whose disk takes nothing shows that it lives, and no more.
        let stays = Step { from: Some(one.clone()), to: one.clone(), proof };
        let Verdict::Take(next) = judge(Some(&known), &stays, true, false, false) else { panic!() };
        assert_eq!((&next.current, &next.contest), (&one, &None));
        assert_eq!(judge(Some(&next), &comes, true, true, false), Verdict::Copy);
    }

    #[test]
    fn a_holder_that_does_not_answer_is_followed_by_who_asked() {
        let (one, two) = (lineage(1, 1), lineage(2, 2));
        let contest = Contest { by: two.clone(), from: "10.0.0.9".parse().unwrap(), challenge: "c".into() };
        let known = Life { contest: Some(contest), ..life(one.clone()) };
        let comes = step(Some(one), two.clone());
        assert_eq!(judge(Some(&known), &comes, false, true, false), Verdict::Take(life(two)));
    }

    #[test]
    fn an_old_ledger_is_a_copy_and_a_newer_one_than_the_store_knows_is_taken_after_a_restore_alone() {
        let known = life(lineage(5, 1));
        for from in [None, Some(lineage(4, 1)), Some(lineage(5, 2))] {
            let to = lineage(from.as_ref().map_or(0, |from| from.number) + 1, 9);
            for restored in [false, true] {
                let verdict = judge(Some(&known), &step(from.clone(), to.clone()), false, false, restored);
                assert_eq!(verdict, Verdict::Copy, "{from:?}");
            }
        }
        let newer = step(Some(lineage(7, 1)), lineage(8, 1));
        assert_eq!(judge(Some(&known), &newer, false, false, false), Verdict::Behind);
        assert_eq!(judge(Some(&known), &newer, false, false, true), Verdict::Take(life(lineage(8, 1))));
        assert_eq!(judge(None, &newer, false, false, false), Verdict::Take(life(lineage(8, 1))));
    }
}

//! Which life of a host's ledger is the one that counts. Pure: it looks at what the store has and says what becomes of it.
//!
//! A machine that is copied, state directory and all, has the same key; so has one that was put back from an old backup.
//! Each start of an agent makes a new [`Incarnation`] of the one before, and the store has the last that was taken. Who comes
//! from another one than that is a copy, or old. Who comes from that one is believed, unless its holder shows that it lives:
//! then the holder steps on by itself, and what the other has is old from then on.
//!
//! A holder may live and be cut off when another comes with its incarnation, and that one is believed. Each start has drawn a
//! secret that is on no disk: one that is known by it has run all the while, so when it is back it goes on, and who was
//! believed meanwhile is a copy.
//!
//! Invariant: of all that have the same ledger one at most goes on; one that has been running goes on before one that came.

use std::net::IpAddr;

use model::api::RefusedCopy;
use model::{Fingerprint, Incarnation, Step, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::secret;

/// How many starts are remembered that were followed and may live.
const FOLLOWED: usize = 16;

/// What the store knows of a host's lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Life {
    /// The one that counts.
    pub(crate) current: Incarnation,
    /// The digest of what the start that goes by it knows; none if nobody goes by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mark: Option<Fingerprint>,
    /// The marks of the starts before that were followed by another, and may live; the last one last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    followed: Vec<Fingerprint>,
    /// The highest number that any incarnation had.
    #[serde(default)]
    highest: u64,
    /// Another came with the current one, and its holder is asked whether it lives.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) contested: bool,
    /// What was refused last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) copy: Option<RefusedCopy>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on: this is to be stored.
    Take(Life),
    /// It has run all the while and goes on, instead of who came meanwhile: this is to be stored.
    Back(Life),
    /// It goes on already.
    Taken,
    /// Its holder is to be asked: this is to be stored.
    Contest(Life),
    /// Its holder was asked, and has not answered yet.
    Wait,
    /// The store is older than the agent.
    Behind,
    /// It is a copy, or old.
    Copy,
}

/// What becomes of a step. `alive` is whether the holder of the current incarnation may live; `asked` whether it was asked for
/// this step's sake; `restored` whether the store was restored and the host has not reported yet.
pub(crate) fn judge(known: Option<&Life>, step: &Step, alive: bool, asked: bool, restored: bool) -> Verdict {
    let mark = step.secret.as_ref().map(|secret| secret::sha256(secret.bytes()));
    let Some(life) = known else {
        let highest = step.to.number;
        let current = step.to.clone();
        let life = Life { current, mark, followed: Vec::new(), highest, contested: false, copy: None };
        return Verdict::Take(life);
    };
    let from = step.from.as_ref().map_or(0, |from| from.number);
    let known_to_run = mark.and_then(|mark| life.followed.iter().position(|followed| *followed == mark));
    if let Some(at) = known_to_run.filter(|_| from <= life.highest) {
        return Verdict::Back(Life { followed: life.followed[..at].to_vec(), ..life.stepped(step, mark) });
    }
    let (holds, goes_by_it) = (step.from.as_ref() == Some(&life.current), life.current == step.to);
    let is_holder = mark.is_some() && mark == life.mark;
    if is_holder && (holds || goes_by_it) {
        let said_before = goes_by_it && !life.contested;
        return if said_before { Verdict::Taken } else { Verdict::Take(life.stepped(step, mark)) };
    }
    if goes_by_it && !holds {
        // Who made it goes by it; who found it in its ledger, made by an earlier start, goes on from it.
        let claimed = life.mark.is_none() && mark.is_some();
        return if claimed { Verdict::Take(life.stepped(step, mark)) } else { Verdict::Taken };
    }
    if holds {
        return match life.mark {
            Some(_) if alive && life.contested => Verdict::Wait,
            // Its holder has answered.
            Some(_) if alive && asked => Verdict::Copy,
            Some(_) if alive => Verdict::Contest(Life { contested: true, ..life.clone() }),
            Some(_) | None => Verdict::Take(life.followed_by(step, mark)),
        };
    }
    if from > life.highest {
        return if restored { Verdict::Take(life.stepped(step, mark)) } else { Verdict::Behind };
    }
    Verdict::Copy
}

impl Life {
    /// The next one is taken.
    fn stepped(&self, step: &Step, mark: Option<Fingerprint>) -> Self {
        let highest = self.highest.max(self.current.number).max(step.to.number);
        Self { current: step.to.clone(), mark, highest, contested: false, ..self.clone() }
    }

    /// The next one is taken from another start, while the holder of the one before may live.
    fn followed_by(&self, step: &Step, mark: Option<Fingerprint>) -> Self {
        let mut next = self.stepped(step, mark);
        next.followed.extend(self.mark.filter(|before| Some(*before) != mark));
        let old = next.followed.len().saturating_sub(FOLLOWED);
        next.followed.drain(..old);
        next
    }

    /// Whether a start that knows a later one than this store is ahead of it.
    pub(crate) fn is_behind(&self, said: &Incarnation) -> bool {
        said.number > self.highest.max(self.current.number)
    }

    /// A copy was refused.
    pub(crate) fn refused(&self, from: IpAddr, at: UnixMillis) -> Self {
        let times = self.copy.as_ref().map_or(0, |copy| copy.times).saturating_add(1);
        Self { copy: Some(RefusedCopy { at, from, times }), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use model::{Lineage, StartSecret};

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
        /// What this start of the agent drew.
        secret: Option<StartSecret>,
        /// What this start of the agent made.
        made: Option<Incarnation>,
        /// What it goes by, once the server took that.
        current: Option<Incarnation>,
        refused: bool,
    }

    impl Machine {
        /// As the agent does it: what was made by an earlier start is settled first.
        fn begin(&mut self, random: &mut Random) -> (Step, bool) {
            let secret = self.secret.get_or_insert_with(|| secret(random.below(256) as u8, random)).clone();
            let settled = self.disk.next.is_none();
            let step = self.disk.begin(random.bytes());
            if settled {
                self.made = Some(step.to.clone());
            }
            let own = self.made.as_ref() == Some(&step.to);
            (Step { secret: own.then_some(secret), ..step }, own)
        }

        fn taken(&mut self, step: &Step, own: bool) {
            self.disk.taken(&step.to);
            if own {
                self.current = Some(step.to.clone());
            }
        }

        fn die(&mut self) {
            (self.secret, self.made, self.current) = (None, None, None);
        }

        fn counts(&self, store: Option<&Life>) -> bool {
            self.current.is_some() && self.current.as_ref() == store.map(|life| &life.current)
        }
    }

    fn secret(byte: u8, random: &mut Random) -> StartSecret {
        let mut bytes = [byte; 32];
        bytes[..8].copy_from_slice(&random.bytes());
        StartSecret::from_random(bytes)
    }

    /// The machine `which` tries to come to the server, and, if it is mortal, may die at any point of it. Of the one that is
    /// there the server may see nothing: it is cut off.
    fn come(
        machines: &mut [Machine],
        which: usize,
        mortal: bool,
        store: &mut Option<Life>,
        random: &mut Random,
    ) {
        if machines[which].refused || machines[which].counts(store.as_ref()) {
            return;
        }
        machines[which].current = None;
        let (step, own) = machines[which].begin(random);
        if mortal && random.below(4) == 0 {
            return machines[which].die();
        }
        let seen = machines.iter().position(|it| it.counts(store.as_ref())).filter(|_| random.below(3) > 0);
        let verdict = match (judge(store.as_ref(), &step, seen.is_some(), false, false), seen) {
            (Verdict::Contest(life), Some(holder)) => {
                *store = Some(life);
                let (answer, own) = machines[holder].begin(random);
                let Verdict::Take(life) = judge(store.as_ref(), &answer, true, false, false) else {
                    panic!("the holder answers")
                };
                *store = Some(life);
                machines[holder].taken(&answer, own);
                judge(store.as_ref(), &step, true, true, false)
            }
            (verdict, _) => verdict,
        };
        match verdict {
            Verdict::Take(life) | Verdict::Back(life) => *store = Some(life),
            Verdict::Taken => {}
            Verdict::Copy => {
                machines[which].refused = true;
                return;
            }
            other => panic!("{other:?}"),
        }
        // Its answer may be lost.
        if random.below(4) > 0 {
            machines[which].taken(&step, own);
        } else if mortal {
            machines[which].die();
        }
    }

    fn lineage(number: u64, random: u8) -> Incarnation {
        format!("{number}-{random:016x}").parse().unwrap()
    }

    /// A step of a start that is known by the number.
    fn step(from: Option<Incarnation>, to: Incarnation, start: u8) -> Step {
        Step { from, to, secret: Some(StartSecret::from_random([start; 32])) }
    }

    fn life(current: Incarnation, start: u8) -> Life {
        let Verdict::Take(life) = judge(None, &step(None, current, start), false, false, false) else {
            panic!()
        };
        life
    }

    fn taken(verdict: Verdict) -> Life {
        match verdict {
            Verdict::Take(life) => life,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_that_dies_at_any_point_goes_on_and_of_its_copies_one_at_most_and_not_before_one_that_runs() {
        let (mut found, mut back) = (0, 0);
        for seed in 1..3_000 {
            let mut random = Random(seed);
            let mut store = None;
            let mut machines = vec![Machine::default()];
            for _ in 0..random.below(40) {
                come(&mut machines, 0, true, &mut store, &mut random);
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
            let lives = machines[0].counts(store.as_ref());
            for _ in 0..60 {
                let which = random.below(machines.len() as u64) as usize;
                let mortal = which > 0 || !lives;
                let was_followed = which == 0 && lives && !machines[0].counts(store.as_ref());
                come(&mut machines, which, mortal, &mut store, &mut random);
                back += usize::from(was_followed && machines[0].counts(store.as_ref()));
                let on = machines.iter().filter(|it| it.counts(store.as_ref())).count();
                assert!(on <= 1, "seed {seed}: two go on");
                assert!(machines.iter().filter(|it| !it.refused).count() >= 1, "seed {seed}: nobody goes on");
                assert!(!lives || !machines[0].refused, "seed {seed}: it lived all the while");
                if mortal && random.below(6) == 0 {
                    machines[which].die();
                }
            }
            found += machines.iter().filter(|it| it.refused).count();
        }
        assert!(found > 3_000 && back > 500, "copies are found out: {found}; one that ran is back: {back}");
    }

    #[test]
    fn a_holder_that_lives_goes_on_and_the_copy_is_found_out_whenever_it_comes_again() {
        let (one, copys, holders) = (lineage(1, 1), lineage(2, 2), lineage(2, 3));
        let known = life(one.clone(), 1);
        let comes = step(Some(one.clone()), copys, 2);
        let Verdict::Contest(known) = judge(Some(&known), &comes, true, false, false) else { panic!() };
        assert_eq!(judge(Some(&known), &comes, true, true, false), Verdict::Wait);
        let third = step(Some(one.clone()), lineage(2, 4), 3);
        assert_eq!(judge(Some(&known), &third, true, false, false), Verdict::Wait, "a third one waits, too");
        let answers = step(Some(one.clone()), holders.clone(), 1);
        let next = taken(judge(Some(&known), &answers, true, false, false));
        assert_eq!((&next.current, next.contested), (&holders, false));
        // Its answer was lost, and is said again.
        assert_eq!(judge(Some(&next), &answers, true, false, false), Verdict::Taken);
        for alive in [false, true] {
            assert_eq!(judge(Some(&next), &comes, alive, true, false), Verdict::Copy);
            assert_eq!(judge(Some(&next), &comes, alive, false, false), Verdict::Copy);
        }
        // A holder whose disk takes nothing shows that it lives, and no more.
        let stays = step(Some(one.clone()), one.clone(), 1);
        let next = taken(judge(Some(&known), &stays, true, false, false));
        assert_eq!((&next.current, next.contested), (&one, false));
        assert_eq!(judge(Some(&next), &comes, true, true, false), Verdict::Copy);
        // So does a copy whose disk takes nothing; it is asked about like any.
        let stays = step(Some(one.clone()), one, 2);
        assert!(matches!(judge(Some(&next), &stays, true, false, false), Verdict::Contest(_)));
    }

    #[test]
    fn a_holder_that_does_not_answer_is_followed_and_goes_on_when_it_is_back() {
        let (one, two, three) = (lineage(1, 1), lineage(2, 2), lineage(3, 3));
        let known = Life { contested: true, ..life(one.clone(), 1) };
        let comes = step(Some(one.clone()), two.clone(), 2);
        let known = taken(judge(Some(&known), &comes, false, true, false));
        assert_eq!((&known.current, known.contested), (&two, false));
        let known =
            taken(judge(Some(&known), &step(Some(two.clone()), three.clone(), 2), true, false, false));
        // Whether the other has a watch open or not: it came later.
        let returns = step(Some(one.clone()), lineage(2, 9), 1);
        for alive in [false, true] {
            let Verdict::Back(back) = judge(Some(&known), &returns, alive, false, false) else { panic!() };
            assert_eq!(back.current, lineage(2, 9));
            let again = step(Some(three.clone()), lineage(4, 4), 2);
            assert_eq!(judge(Some(&back), &again, false, false, false), Verdict::Copy);
            assert_eq!(judge(Some(&back), &comes, false, false, false), Verdict::Copy);
        }
        // One that has started anew since has the same ledger as the copy, and no more.
        let anew = step(Some(one), lineage(2, 8), 8);
        assert_eq!(judge(Some(&known), &anew, false, false, false), Verdict::Copy);
    }

    #[test]
    fn what_an_earlier_start_made_is_settled_and_nobody_goes_by_it() {
        let (one, two, three) = (lineage(1, 1), lineage(2, 2), lineage(3, 3));
        let settles = Step { secret: None, ..step(Some(one.clone()), two.clone(), 0) };
        let known = taken(judge(Some(&life(one.clone(), 1)), &settles, false, false, false));
        assert_eq!(judge(Some(&known), &settles, true, false, false), Verdict::Taken);
        let own = step(Some(two.clone()), three.clone(), 2);
        assert_eq!(taken(judge(Some(&known), &own, true, false, false)).current, three);
        // Who made it lives, and its word comes after that of a copy that found it in its ledger.
        let Verdict::Back(known) = judge(Some(&known), &step(Some(one), two, 1), true, false, false) else {
            panic!()
        };
        assert!(matches!(judge(Some(&known), &own, true, false, false), Verdict::Contest(_)));
    }

    #[test]
    fn an_old_ledger_is_a_copy_and_a_newer_one_than_the_store_knows_is_taken_after_a_restore_alone() {
        let known = life(lineage(5, 1), 1);
        for from in [None, Some(lineage(4, 1)), Some(lineage(5, 2))] {
            let to = lineage(from.as_ref().map_or(0, |from| from.number) + 1, 9);
            for restored in [false, true] {
                let step = step(from.clone(), to.clone(), 2);
                assert_eq!(judge(Some(&known), &step, false, false, restored), Verdict::Copy, "{from:?}");
            }
        }
        let newer = step(Some(lineage(7, 1)), lineage(8, 1), 2);
        assert_eq!(judge(Some(&known), &newer, false, false, false), Verdict::Behind);
        assert_eq!(taken(judge(Some(&known), &newer, false, false, true)).current, lineage(8, 1));
        assert_eq!(taken(judge(None, &newer, false, false, false)), life(lineage(8, 1), 2));
    }
}

//! From observed and desired to steps.
//!
//! Invariant: removals come first, in the reverse order of making; then what is made or changed, in the order of
//! making. A step that makes a device anew takes what hung on it with it: the next diff puts that back, so the
//! reconciler diffs until nothing is left.

use std::collections::BTreeSet;

use crate::object::{Key, LinkKind, Object, Place, State};

/// One thing to do to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Take it away; not being there is fine.
    Remove(Place, Key),
    /// Make it; being there already, like this, is fine.
    Add(Place, Key, Object),
    /// It is there, but different: make it like this (`.2`) from what it is (`.3`).
    Change(Place, Key, Object, Object),
}

/// How much of the state a diff is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All of it: what is observed and not desired goes.
    Everything,
    /// Only objects of these names: an attachment's, say. Costs the same whatever else there is.
    Only(BTreeSet<(Place, Key)>),
}

/// What to do to `observed` so that it becomes `desired`, within `scope`.
pub fn diff(observed: &State, desired: &State, scope: &Scope) -> Vec<Step> {
    let mut removals = Vec::new();
    let mut makings = Vec::new();
    let mut visit = |name: &(Place, Key), have: Option<&Object>, want: Option<&Object>| {
        let (place, key) = name;
        match (have, want) {
            (Some(have), Some(want)) if !want.satisfied_by(have) => {
                makings.push(Step::Change(place.clone(), key.clone(), want.clone(), have.clone()));
            }
            (None, Some(want)) if !made_by_other_end(want) => {
                makings.push(Step::Add(place.clone(), key.clone(), want.clone()));
            }
            (Some(_), None) if !goes_with_namespace(place, key, desired) => {
                removals.push(Step::Remove(place.clone(), key.clone()));
            }
            (Some(_) | None, Some(_) | None) => {}
        }
    };
    match scope {
        Scope::Everything => {
            for (name, have) in observed {
                visit(name, Some(have), desired.get(name));
            }
            for (name, want) in desired.iter().filter(|(name, _)| !observed.contains_key(name)) {
                visit(name, None, Some(want));
            }
        }
        Scope::Only(names) => {
            for name in names {
                visit(name, observed.get(name), desired.get(name));
            }
        }
    }
    removals.sort_by(|a, b| order(b).cmp(&order(a)));
    makings.sort_by(|a, b| order(a).cmp(&order(b)));
    removals.append(&mut makings);
    removals
}

/// The other end of a veth appears with the end that is made.
fn made_by_other_end(want: &Object) -> bool {
    matches!(want, Object::Link(link) if link.kind == LinkKind::VethEnd)
}

/// When a whole namespace goes, naming all that is in it would be noise.
fn goes_with_namespace(place: &Place, key: &Key, desired: &State) -> bool {
    *place != Place::Host && *key != Key::Netns && !desired.contains_key(&(place.clone(), Key::Netns))
}

/// Kind by kind over all places, so that a host's route can rely on a router's device. Within devices, bridges come
/// before their ports.
fn order(step: &Step) -> (u8, u8, &Place, &Key) {
    let (place, key, object) = match step {
        Step::Remove(place, key) => (place, key, None),
        Step::Add(place, key, object) | Step::Change(place, key, object, _) => (place, key, Some(object)),
    };
    let kind = match key {
        Key::Netns => 0,
        Key::Table(_) => 1,
        Key::Link(_) => 2,
        Key::Sysctl(_) => 3,
        Key::Address(..) => 4,
        Key::Rule(_) => 5,
        Key::Neighbour(..) => 6,
        Key::Fdb(..) => 7,
        Key::Route(..) => 8,
        Key::Element(..) => 9,
        Key::Program(_) => 10,
    };
    let rank = match object {
        Some(Object::Link(link)) => u8::from(!matches!(link.kind, LinkKind::Bridge { .. })),
        // A gateway's route needs the route to that gateway: on-link and narrower ones first.
        Some(Object::Route(route)) => u8::from(route.via.is_some()),
        _ => 0,
    };
    (kind, rank, place, key)
}

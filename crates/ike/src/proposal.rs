//! Agreeing on a suite (RFC 7296 §2.7, §3.3.6): what is offered, what is selected, and whether a selection is right.
//!
//! A proposal of the peer is acceptable when each type of transform in it has one that is spoken here. Of its
//! proposals the first acceptable is taken, and in it what *this* host prefers.
//!
//! Invariant: only combined-mode ciphers, HMAC-SHA-2 and the three groups of [`Group`] can ever be selected.

use crate::crypto::{Encr, Group, Prf};
use crate::error::{Error, Incompatible, Misbehaved, syntax};
use crate::wire::{EspSpi, IkeSpi, Proposal, Protocol, SaPayload, Transform, TransformType};

/// "None" in a registry of transforms that has one: integrity, key exchange.
const NONE: u16 = 0;

/// What an IKE SA uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IkeSuite {
    /// The cipher.
    pub encr: Encr,
    /// The pseudo-random function.
    pub prf: Prf,
    /// The key exchange.
    pub group: Group,
}

impl std::fmt::Display for IkeSuite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.encr, self.prf, self.group)
    }
}

/// What a CHILD_SA uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EspSuite {
    /// The cipher.
    pub encr: Encr,
    /// The key exchange of its own, if it has one.
    pub group: Option<Group>,
    /// Extended sequence numbers.
    pub esn: bool,
}

impl std::fmt::Display for EspSuite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.encr)?;
        if let Some(group) = self.group {
            write!(f, "/{group}")?;
        }
        f.write_str(if self.esn { "/ESN" } else { "/NO_EXT_SEQ" })
    }
}

/// What was selected from the peer's offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selected<Suite, Spi> {
    /// The suite.
    pub suite: Suite,
    /// The peer's SPI; for an IKE SA it is in the proposal only when the SA is rekeyed.
    pub peer_spi: Spi,
    number: u8,
    /// Chosen transforms, one of each type that was offered.
    transforms: Vec<Transform>,
}

impl Selected<IkeSuite, Option<IkeSpi>> {
    /// The answer; `spi` is this host's new one when the IKE SA is rekeyed, `None` in IKE_SA_INIT.
    pub fn answer(&self, spi: Option<IkeSpi>) -> SaPayload {
        let spi = spi.map_or_else(Vec::new, |spi| spi.to_bytes().to_vec());
        one(self.number, Protocol::Ike, spi, self.transforms.clone())
    }
}

impl Selected<EspSuite, EspSpi> {
    /// The answer; `spi` is the one this host will receive under.
    pub fn answer(&self, spi: EspSpi) -> SaPayload {
        one(self.number, Protocol::Esp, spi.0.to_be_bytes().to_vec(), self.transforms.clone())
    }
}

/// What this host offers and accepts for IKE SAs, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IkeOffer {
    /// Ciphers.
    pub encr: Vec<Encr>,
    /// Pseudo-random functions.
    pub prf: Vec<Prf>,
    /// Groups. The first is the one whose public value is sent unasked.
    pub groups: Vec<Group>,
}

impl Default for IkeOffer {
    fn default() -> Self {
        IkeOffer {
            encr: vec![Encr::Aes256Gcm16, Encr::Aes128Gcm16],
            prf: vec![Prf::HmacSha256, Prf::HmacSha384, Prf::HmacSha512],
            groups: vec![Group::X25519, Group::P256, Group::P384],
        }
    }
}

impl IkeOffer {
    /// The SA payload of a request; `spi` when an IKE SA is rekeyed.
    pub fn request(&self, spi: Option<IkeSpi>) -> SaPayload {
        let mut transforms: Vec<_> = self.encr.iter().map(|e| encr_transform(*e)).collect();
        transforms.extend(self.prf.iter().map(|p| Transform::new(TransformType::Prf, p.id())));
        transforms.extend(self.groups.iter().map(|g| Transform::new(TransformType::KeyExchange, g.id())));
        let spi = spi.map_or_else(Vec::new, |spi| spi.to_bytes().to_vec());
        one(1, Protocol::Ike, spi, transforms)
    }

    /// The best of what the peer offers. The group of its KE payload, `ke`, is preferred if it is acceptable: that
    /// saves a round trip. The caller compares `suite.group` with it and answers [`Incompatible::WrongGroup`].
    ///
    /// # Errors
    /// [`Incompatible::NoProposal`].
    pub fn select(&self, offered: &SaPayload, ke: u16) -> Result<Selected<IkeSuite, Option<IkeSpi>>, Error> {
        let acceptable = |proposal: &Proposal| {
            let peer_spi = match proposal.spi.as_slice() {
                [] => None,
                spi => Some(IkeSpi::from_bytes(spi.try_into().ok()?)),
            };
            let mut chosen = Chosen::new(proposal, Protocol::Ike)?;
            let encr = chosen.pick(TransformType::Encryption, &self.encr, encr_of)?;
            let prf = chosen.pick(TransformType::Prf, &self.prf, |t| Prf::from_id(t.id))?;
            let group = chosen.pick(TransformType::KeyExchange, &prefer(&self.groups, ke), group_of)?;
            let transforms = chosen.finish()?;
            let suite = IkeSuite { encr, prf, group };
            Some(Selected { suite, peer_spi, number: proposal.number, transforms })
        };
        offered.proposals.iter().find_map(acceptable).ok_or_else(|| Incompatible::NoProposal.into())
    }

    /// Reads the peer's answer to `request`.
    ///
    /// # Errors
    /// [`Misbehaved::NotOffered`] or [`Misbehaved::Syntax`].
    pub fn accept(
        &self,
        request: &SaPayload,
        answer: &SaPayload,
    ) -> Result<Selected<IkeSuite, Option<IkeSpi>>, Error> {
        check_answer(request, answer)?;
        self.select(answer, NONE).map_err(|_| Misbehaved::NotOffered.into())
    }
}

/// Whether CHILD_SAs have a key exchange of their own (perfect forward secrecy).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pfs {
    /// Offered, and done without where the peer wants none.
    Preferred,
    /// No CHILD_SA by CREATE_CHILD_SA without.
    Required,
    /// Neither offered nor accepted.
    Off,
}

/// In which exchange a CHILD_SA is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildExchange {
    /// IKE_AUTH, which has no KE payload: groups are neither offered nor looked at (RFC 7296 §1.2).
    Auth,
    /// CREATE_CHILD_SA, with the group of the KE payload if there is one.
    Create(Option<u16>),
}

/// What this host offers and accepts for CHILD_SAs, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EspOffer {
    /// Ciphers.
    pub encr: Vec<Encr>,
    /// Groups. The first is the one whose public value is sent unasked.
    pub groups: Vec<Group>,
    /// Whether groups are used.
    pub pfs: Pfs,
    /// Extended sequence numbers, or not; both may be offered.
    pub esn: Vec<bool>,
}

impl Default for EspOffer {
    fn default() -> Self {
        EspOffer {
            encr: vec![Encr::Aes256Gcm16, Encr::Aes128Gcm16],
            groups: vec![Group::X25519, Group::P256, Group::P384],
            pfs: Pfs::Preferred,
            esn: vec![true, false],
        }
    }
}

impl EspOffer {
    /// The SA payload of a request; `spi` is the one this host will receive under. The exchange's group, if any, is
    /// that of the KE payload and comes first.
    pub fn request(&self, exchange: ChildExchange, spi: EspSpi) -> SaPayload {
        let mut transforms: Vec<_> = self.encr.iter().map(|e| encr_transform(*e)).collect();
        if let ChildExchange::Create(ke) = exchange
            && self.pfs != Pfs::Off
        {
            let groups = prefer(&self.groups, ke.unwrap_or(NONE));
            transforms.extend(groups.iter().map(|g| Transform::new(TransformType::KeyExchange, g.id())));
            if self.pfs == Pfs::Preferred {
                transforms.push(Transform::new(TransformType::KeyExchange, NONE));
            }
        }
        transforms.extend(self.esn.iter().map(|esn| Transform::new(TransformType::Esn, u16::from(*esn))));
        one(1, Protocol::Esp, spi.0.to_be_bytes().to_vec(), transforms)
    }

    /// The best of what the peer offers. The caller compares `suite.group` with the KE payload's, as for
    /// [`IkeOffer::select`].
    ///
    /// # Errors
    /// [`Incompatible::NoProposal`].
    pub fn select(
        &self,
        offered: &SaPayload,
        exchange: ChildExchange,
    ) -> Result<Selected<EspSuite, EspSpi>, Error> {
        let acceptable = |proposal: &Proposal| {
            let peer_spi = EspSpi(u32::from_be_bytes(proposal.spi.as_slice().try_into().ok()?));
            let mut chosen = Chosen::new(proposal, Protocol::Esp)?;
            let encr = chosen.pick(TransformType::Encryption, &self.encr, encr_of)?;
            let group = match exchange {
                ChildExchange::Auth => {
                    chosen.ignore(TransformType::KeyExchange);
                    None
                }
                ChildExchange::Create(ke) => match self.pick_group(&mut chosen, ke)? {
                    ChildGroup::Own(group) => Some(group),
                    ChildGroup::None => None,
                },
            };
            let esn = if proposal.of(TransformType::Esn).next().is_some() {
                chosen.pick(TransformType::Esn, &self.esn, esn_of)?
            } else if self.esn.contains(&false) {
                false
            } else {
                return None;
            };
            let transforms = chosen.finish()?;
            let suite = EspSuite { encr, group, esn };
            Some(Selected { suite, peer_spi, number: proposal.number, transforms })
        };
        offered.proposals.iter().find_map(acceptable).ok_or_else(|| Incompatible::NoProposal.into())
    }

    /// Picks the group, or none, if the proposal leaves a choice that is acceptable; fails with `None` as a whole.
    fn pick_group(&self, chosen: &mut Chosen<'_>, ke: Option<u16>) -> Option<ChildGroup> {
        let mut groups = Vec::new();
        if self.pfs != Pfs::Off {
            groups.extend(prefer(&self.groups, ke.unwrap_or(NONE)).into_iter().map(ChildGroup::Own));
        }
        if self.pfs != Pfs::Required {
            // Without a KE payload "none" spares a round trip, where both allow it.
            groups.insert(if ke.is_none() { 0 } else { groups.len() }, ChildGroup::None);
        }
        if chosen.proposal.of(TransformType::KeyExchange).next().is_none() {
            return groups.contains(&ChildGroup::None).then_some(ChildGroup::None);
        }
        chosen.pick(TransformType::KeyExchange, &groups, |t| match t.id {
            NONE => Some(ChildGroup::None),
            id => Group::from_id(id).map(ChildGroup::Own),
        })
    }

    /// Reads the peer's answer to `request`.
    ///
    /// # Errors
    /// [`Misbehaved::NotOffered`] or [`Misbehaved::Syntax`].
    pub fn accept(
        &self,
        request: &SaPayload,
        answer: &SaPayload,
        exchange: ChildExchange,
    ) -> Result<Selected<EspSuite, EspSpi>, Error> {
        check_answer(request, answer)?;
        self.select(answer, exchange).map_err(|_| Misbehaved::NotOffered.into())
    }
}

/// The key exchange of a CHILD_SA.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ChildGroup {
    /// Its own.
    Own(Group),
    /// None: its keys come from the IKE SA's alone.
    None,
}

/// The transforms picked from one proposal so far.
struct Chosen<'a> {
    proposal: &'a Proposal,
    done: Vec<TransformType>,
    transforms: Vec<Transform>,
}

impl<'a> Chosen<'a> {
    fn new(proposal: &'a Proposal, protocol: Protocol) -> Option<Self> {
        (proposal.protocol == protocol).then(|| Chosen { proposal, done: Vec::new(), transforms: Vec::new() })
    }

    /// The first of `preferred` that the proposal has as a transform of this type.
    fn pick<T: PartialEq + Copy>(
        &mut self,
        kind: TransformType,
        preferred: &[T],
        read: impl Fn(&Transform) -> Option<T>,
    ) -> Option<T> {
        self.done.push(kind);
        preferred.iter().find_map(|wanted| {
            let found = self.proposal.of(kind).find(|t| t.understood() && read(t) == Some(*wanted))?;
            self.transforms.push(found.clone());
            Some(*wanted)
        })
    }

    fn ignore(&mut self, kind: TransformType) {
        self.done.push(kind);
    }

    /// All that was picked, if no transform of another type must be chosen. Integrity beside a combined-mode cipher,
    /// and additional key exchanges, must allow "none".
    fn finish(mut self) -> Option<Vec<Transform>> {
        for transform in &self.proposal.transforms {
            if self.done.contains(&transform.kind) {
                continue;
            }
            let may_be_none = match transform.kind {
                TransformType::Integrity
                | TransformType::AdditionalKeyExchange1
                | TransformType::AdditionalKeyExchange2
                | TransformType::AdditionalKeyExchange3
                | TransformType::AdditionalKeyExchange4
                | TransformType::AdditionalKeyExchange5
                | TransformType::AdditionalKeyExchange6
                | TransformType::AdditionalKeyExchange7 => true,
                TransformType::Encryption
                | TransformType::Prf
                | TransformType::KeyExchange
                | TransformType::Esn
                | TransformType::Other(_) => false,
            };
            let none = self.proposal.of(transform.kind).find(|t| t.id == NONE && t.attributes.is_empty());
            if !may_be_none {
                return None;
            }
            self.transforms.push(none?.clone());
            self.done.push(transform.kind);
        }
        Some(self.transforms)
    }
}

fn encr_transform(encr: Encr) -> Transform {
    Transform::with_key_len(TransformType::Encryption, Encr::AES_GCM_16, encr.key_len() as u16 * 8)
}

fn encr_of(transform: &Transform) -> Option<Encr> {
    Encr::from_transform(transform.id, transform.key_len())
}

fn group_of(transform: &Transform) -> Option<Group> {
    Group::from_id(transform.id)
}

fn esn_of(transform: &Transform) -> Option<bool> {
    match transform.id {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// The groups with that of the KE payload first, if it is among them.
fn prefer(groups: &[Group], ke: u16) -> Vec<Group> {
    let mut groups = groups.to_vec();
    groups.sort_by_key(|g| g.id() != ke);
    groups
}

fn one(number: u8, protocol: Protocol, spi: Vec<u8>, transforms: Vec<Transform>) -> SaPayload {
    SaPayload { proposals: vec![Proposal { number, protocol, spi, transforms }] }
}

/// One proposal, with one transform of each type, each of which was offered in the proposal of the same number.
fn check_answer(request: &SaPayload, answer: &SaPayload) -> Result<(), Error> {
    let [chosen] = answer.proposals.as_slice() else {
        return Err(syntax("answer with several proposals"));
    };
    for transform in &chosen.transforms {
        if chosen.of(transform.kind).count() != 1 {
            return Err(syntax("answer with several transforms of a type"));
        }
    }
    // Proposals of one number are alternatives of different protocols; nothing forbids more of them.
    let offered = request.proposals.iter().any(|p| {
        p.number == chosen.number
            && p.protocol == chosen.protocol
            && chosen.transforms.iter().all(|t| {
                let none_beside_aead = t.kind == TransformType::Integrity && t.id == NONE;
                none_beside_aead || p.transforms.contains(t)
            })
    });
    if offered { Ok(()) } else { Err(Misbehaved::NotOffered.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn key_exchange(id: u16) -> Transform {
        Transform::new(TransformType::KeyExchange, id)
    }

    fn aes(id: u16, bits: u16) -> Transform {
        Transform::with_key_len(TransformType::Encryption, id, bits)
    }

    fn ike(transforms: Vec<Transform>) -> Proposal {
        Proposal { number: 1, protocol: Protocol::Ike, spi: Vec::new(), transforms }
    }

    /// PRF_HMAC_SHA2_256.
    fn prf() -> Transform {
        Transform::new(TransformType::Prf, 5)
    }

    fn offered(proposals: Vec<Proposal>) -> SaPayload {
        SaPayload { proposals }
    }

    #[test]
    fn two_of_us_agree_on_what_each_prefers() {
        let offer = IkeOffer::default();
        let request = offer.request(None);
        let selected = offer.select(&request, Group::X25519.id()).unwrap();
        assert_eq!(selected.suite.to_string(), "AES_GCM_16_256/PRF_HMAC_SHA2_256/CURVE_25519");
        assert_eq!(selected.peer_spi, None);
        assert_eq!(offer.accept(&request, &selected.answer(None)).unwrap().suite, selected.suite);
    }

    #[test]
    fn the_group_of_the_ke_payload_is_preferred_if_it_is_acceptable() {
        let offer = IkeOffer::default();
        let group = |ke| offer.select(&offer.request(None), ke).unwrap().suite.group;
        assert_eq!(group(Group::P384.id()), Group::P384);
        assert_eq!(group(14), Group::X25519, "MODP is not, so the peer is asked for our first");
    }

    #[test]
    fn the_first_acceptable_proposal_of_the_peer_is_taken() {
        let cbc =
            ike(vec![aes(12, 256), prf(), Transform::new(TransformType::Integrity, 12), key_exchange(14)]);
        let mut gcm = ike(vec![aes(20, 128), prf(), key_exchange(19), key_exchange(31)]);
        gcm.number = 2;
        let request = offered(vec![cbc.clone(), gcm.clone()]);
        let selected = IkeOffer::default().select(&request, 19).unwrap();
        assert_eq!(
            selected.suite,
            IkeSuite { encr: Encr::Aes128Gcm16, prf: Prf::HmacSha256, group: Group::P256 }
        );
        assert_eq!(selected.answer(None).proposals[0].number, 2);
        let error = IkeOffer::default().select(&offered(vec![cbc]), 14).unwrap_err();
        assert_eq!(error, Incompatible::NoProposal.into());
        assert_eq!(error.notify().map(|n| n.kind), Some(crate::wire::NotifyType::NoProposalChosen));
    }

    #[test]
    fn a_type_that_is_not_known_makes_a_proposal_unacceptable_and_none_beside_aead_does_not() {
        let select = |more: Vec<Transform>| {
            let mut proposal = ike(vec![aes(20, 256), prf(), key_exchange(31)]);
            proposal.transforms.extend(more);
            IkeOffer::default().select(&offered(vec![proposal]), 31)
        };
        let none = Transform::new(TransformType::Integrity, NONE);
        let chosen = select(vec![none.clone()]).unwrap();
        assert!(chosen.answer(None).proposals[0].transforms.contains(&none), "one of each type is chosen");
        assert!(select(vec![Transform::new(TransformType::Integrity, 12)]).is_err());
        assert!(select(vec![Transform::new(TransformType::Other(99), NONE)]).is_err());
        let mlkem = Transform::new(TransformType::AdditionalKeyExchange1, 36);
        assert!(select(vec![mlkem.clone()]).is_err());
        assert!(select(vec![mlkem, Transform::new(TransformType::AdditionalKeyExchange1, NONE)]).is_ok());
    }

    #[test]
    fn a_transform_with_an_unknown_attribute_is_not_chosen() {
        let mut strange = aes(20, 256);
        strange
            .attributes
            .push(crate::wire::Attribute { kind: 99, value: crate::wire::AttributeValue::Short(1) });
        let request = offered(vec![ike(vec![strange, aes(20, 128), prf(), key_exchange(31)])]);
        let selected = IkeOffer::default().select(&request, 31).unwrap();
        assert_eq!(selected.suite.encr, Encr::Aes128Gcm16);
    }

    #[test]
    fn an_answer_that_was_not_offered_is_refused() {
        let offer = IkeOffer { encr: vec![Encr::Aes256Gcm16], ..IkeOffer::default() };
        let request = offer.request(None);
        let accept = |answer: Proposal| offer.accept(&request, &offered(vec![answer])).map(|s| s.suite);
        let good = ike(vec![aes(20, 256), prf(), key_exchange(31)]);
        assert!(accept(good.clone()).is_ok());
        let wrong = [
            Proposal { number: 2, ..good.clone() },
            Proposal { protocol: Protocol::Esp, ..good.clone() },
            ike(vec![aes(20, 128), prf(), key_exchange(31)]),
            ike(vec![aes(20, 256), prf()]),
            ike(vec![aes(20, 256), prf(), key_exchange(31), Transform::new(TransformType::Esn, 0)]),
        ];
        for answer in wrong {
            assert_eq!(accept(answer), Err(Misbehaved::NotOffered.into()));
        }
        let two = ike(vec![aes(20, 256), prf(), key_exchange(31), key_exchange(19)]);
        assert!(matches!(accept(two), Err(Error::PeerMisbehaved(Misbehaved::Syntax(_)))));
        assert!(offer.accept(&request, &offered(vec![good.clone(), good])).is_err());
    }

    #[test]
    fn rekeying_an_ike_sa_carries_both_new_spis() {
        let offer = IkeOffer::default();
        let request = offer.request(Some(IkeSpi(7)));
        let selected = offer.select(&request, 31).unwrap();
        assert_eq!(selected.peer_spi, Some(IkeSpi(7)));
        let accepted = offer.accept(&request, &selected.answer(Some(IkeSpi(8)))).unwrap();
        assert_eq!(accepted.peer_spi, Some(IkeSpi(8)));
        let mut short = request;
        short.proposals[0].spi.truncate(4);
        assert!(offer.select(&short, 31).is_err());
    }

    #[test]
    fn a_child_of_ike_auth_has_no_group_even_if_the_peer_lists_one() {
        let offer = EspOffer::default();
        let mut request = offer.request(ChildExchange::Auth, EspSpi(0x0102_0304));
        assert!(request.proposals[0].of(TransformType::KeyExchange).next().is_none());
        request.proposals[0].transforms.push(key_exchange(31));
        let selected = offer.select(&request, ChildExchange::Auth).unwrap();
        assert_eq!(selected.suite, EspSuite { encr: Encr::Aes256Gcm16, group: None, esn: true });
        assert_eq!(selected.peer_spi, EspSpi(0x0102_0304));
        assert!(selected.answer(EspSpi(9)).proposals[0].of(TransformType::KeyExchange).next().is_none());
    }

    #[test]
    fn a_peer_without_esn_gets_none_and_one_that_says_nothing_as_well() {
        let offer = EspOffer::default();
        let mut request = offer.request(ChildExchange::Auth, EspSpi(1));
        let both = request.proposals[0].of(TransformType::Esn).map(|t| t.id).collect::<Vec<_>>();
        assert_eq!(both, [1, 0]);
        request.proposals[0].transforms.retain(|t| t.kind != TransformType::Esn || t.id == 0);
        assert!(!offer.select(&request, ChildExchange::Auth).unwrap().suite.esn);
        request.proposals[0].transforms.retain(|t| t.kind != TransformType::Esn);
        assert!(!offer.select(&request, ChildExchange::Auth).unwrap().suite.esn);
        let strict = EspOffer { esn: vec![true], ..offer };
        assert!(strict.select(&request, ChildExchange::Auth).is_err());
    }

    #[test]
    fn forward_secrecy_is_had_where_both_can_and_done_without_where_allowed() {
        let with = |pfs| EspOffer { pfs, ..EspOffer::default() };
        let create = ChildExchange::Create(Some(Group::P256.id()));
        let agreed = |ours: Pfs, theirs: Pfs| {
            let request = with(theirs).request(create, EspSpi(1));
            with(ours).select(&request, create).ok().map(|s| s.suite.group)
        };
        assert_eq!(agreed(Pfs::Preferred, Pfs::Preferred), Some(Some(Group::P256)));
        assert_eq!(agreed(Pfs::Required, Pfs::Preferred), Some(Some(Group::P256)));
        assert_eq!(agreed(Pfs::Preferred, Pfs::Off), Some(None));
        assert_eq!(agreed(Pfs::Off, Pfs::Preferred), Some(None));
        assert_eq!(agreed(Pfs::Required, Pfs::Off), None);
        assert_eq!(agreed(Pfs::Off, Pfs::Required), None);
    }
}
